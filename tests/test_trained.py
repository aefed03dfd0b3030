"""`dtrain.load`: what a program gets is what the commands give."""

import dataclasses
import importlib.resources
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import dtrain
from dtrain.checkpoint.export import export
from dtrain.config import load as load_config
from dtrain.errors import UserError
from dtrain.models import DiT, UNet
from dtrain.models.build import build
from dtrain.run import RunDirectory
from tests.command_line import command
from tests.digits import CONFIG
from tests.ranks import run_ranks
from tests.training.runs import copied


@pytest.fixture(scope="module")
def config(digits, finished_run, tmp_path_factory):
    return copied(finished_run, digits, tmp_path_factory.mktemp("runs"), "eval.steps=10")


def both(path, out):
    """(the images of `dtrain sample`, those of `dtrain.load`), in one process: 30 images in blocks of 12."""
    settings = ["--guidance", 2, "--steps", 5, "--seed", 3, "--eta", 0.5, "--step", 20]
    code, said = command("sample", path, "-n", 30, *settings, "--out", out)
    assert code == 0, said
    drawn = dtrain.load(path, step=20).sample(30, guidance=2, steps=5, seed=3, eta=0.5)
    with np.load(out) as kept:
        return kept["images"], drawn


def test_it_draws_the_images_of_the_command_bit_for_bit(config, tmp_path):
    ((by_command, drawn),) = run_ranks(both, 1, config.run.path, tmp_path / "images.npz")
    assert drawn.dtype == np.uint8
    assert drawn.shape == (30, 8, 8, 1)
    np.testing.assert_array_equal(by_command, drawn)


def test_weights_and_labels_are_those_asked_for(config):
    path = config.run.path
    run = dtrain.load(path)
    assert (run.step, run.images, run.config.run.name) == (40, 960, "tiny")
    assert not run.model.training
    weights = {name: dtrain.load(path, **which).model.state_dict()["x_embedder.proj.weight"] for name, which in
               {"ema": {}, "raw": {"ema": None}, "older": {"step": 20}}.items()}  # fmt: skip
    assert len({float(w.double().abs().sum()) for w in weights.values()}) == 3
    assert run.class_names == [str(i) for i in range(10)]
    by_name = run.sample(labels=["3", 7, "3"])
    np.testing.assert_array_equal(by_name, run.sample(3, labels=np.array([3, 7, 3])))
    np.testing.assert_array_equal(run.sample(2, labels=3), run.sample(labels=[3, 3]))
    np.testing.assert_array_equal(run.sample(12), run.sample(labels=[*range(10), 0, 1]))
    assert run.sample().shape == (1, 8, 8, 1)


def test_an_exported_folder_is_loaded_as_the_run_is(config, tmp_path):
    out = tmp_path / "out"
    export(RunDirectory(config.run.path), out, 20, 0, "fp32", "safetensors")
    given, run = dtrain.load(out), dtrain.load(config.run.path, step=20)
    assert (given.step, given.class_names) == (20, run.class_names)
    np.testing.assert_array_equal(given.sample(13, guidance=2), run.sample(13, guidance=2))
    for other in ({"step": 40}, {"ema": 1}, {"ema": None}):
        with pytest.raises(UserError, match="holds ema_0 of step 20 alone, not ema"):
            dtrain.load(out, **other)
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="lacks sections that sampling needs; export the checkpoint again"):
        dtrain.load(out)


def test_mistakes_are_one_line(config):
    run = dtrain.load(config.run.path)
    mistakes = [
        (lambda: dtrain.load("nowhere"), "no run at nowhere or runs/nowhere"),
        (lambda: dtrain.load(config.run.path, ema=1), "there is no EMA 1: run tiny has 1, counted from 0"),
        (lambda: dtrain.load(config.run.path, step=9), "no checkpoint of step 9; there are: 10, 20, 30, 40"),
        (lambda: run.sample(labels=[10]), "there is no class 10; the model has 10, counted from 0"),
        (lambda: run.sample(labels=["three"]), "there is no class 'three'; known are 0, 1, 2"),
        (lambda: run.sample(2, labels=[1]), "there are 1 labels for 2 images"),
        (lambda: run.sample(0), "n is 0; take at least 1"),
        (lambda: run.sample(1, steps=2000), "eval.steps 2000 exceeds diffusion.timesteps 1000"),
        (lambda: run.sample(1, sampler="euler"), "eval.sampler euler does not walk a gaussian process"),
    ]
    for call, message in mistakes:
        with pytest.raises(UserError, match=message):
            call()


def test_guidance_that_was_never_trained_is_refused_as_by_the_command(config):
    run = dtrain.load(config.run.path)
    untold = config.model_copy(update={"diffusion": config.diffusion.model_copy(update={"label_dropout": 0.0})})
    with pytest.raises(UserError, match=r"diffusion\.label_dropout 0 never trains; take guidance 1"):
        dataclasses.replace(run, config=untold).sample(1, guidance=2)


def test_importing_dtrain_imports_no_torch_until_something_is_loaded():
    code = (
        "import sys, dtrain\nassert 'load' in dir(dtrain) and dtrain.__version__\nassert 'torch' not in sys.modules\n"
        "from dtrain import load\nassert 'torch' in sys.modules and 'deepspeed' not in sys.modules\n"
        "try: dtrain.lode\nexcept AttributeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'dtrain' has no attribute 'lode'\n"


def test_models_come_with_the_initial_weights_of_a_run():
    for name, made in (
        ("digits-dit", DiT(8, 1, patch=2, width=96, depth=4, heads=4, num_classes=10, frequency_shift=1, seed=7)),
        ("digits-unet", UNet(8, 1, width=32, multipliers=[1, 2], res_blocks=1, attention=[4], num_classes=10, seed=7)),
    ):
        wanted = build(load_config(CONFIG.with_stem(name), ["run.seed=7"])).state_dict()
        assert made.state_dict().keys() == wanted.keys()
        assert all(torch.equal(value, wanted[key]) for key, value in made.state_dict().items())


def test_the_package_says_that_it_is_typed():
    assert (importlib.resources.files("dtrain") / "py.typed").is_file()
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["dtrain"] == ["py.typed", "normals.npy"]
