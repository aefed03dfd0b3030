"""Variational diffusion through the whole training: the same at any number of ranks, its bound in each evaluation."""

import shutil

import numpy as np
import pytest
import torch

import dtrain
from dtrain.checkpoint.directory import complete
from dtrain.checkpoint.export import export
from dtrain.checkpoint.format import Checkpoint
from dtrain.errors import UserError
from dtrain.evaluation.evaluate import evaluate
from dtrain.evaluation.opened import open_generator
from dtrain.evaluation.reference import Reference
from dtrain.models.build import build
from dtrain.models.monotone import MonotoneCurve
from dtrain.models.published import load_published
from dtrain.run import RunDirectory
from dtrain.tracking.journal import read
from tests.digits import tiny
from tests.longer import mostly_longer
from tests.training.runs import trained

LEARNED = ["diffusion={process: vdm, schedule: learned, schedule_lr_factor: 50, stratified: true}"]
CHOICES = {
    "continuous": ["diffusion={process: vdm, stratified: true}", "model.fourier=[7, 8]"],
    "chain": ["diffusion={process: vdm, timesteps: 20}"],
    "learned": LEARNED,
    "learned chain": ["diffusion={process: vdm, timesteps: 20, schedule: learned}"],
    "learned in bf16": [*LEARNED, "deepspeed.precision=bf16_autocast"],
}
SHORT = ["train.steps=8", "eval.every=8", "eval.metrics=[fd, bpd]", "eval.validation_images=150", "eval.num_samples=24"]
SHORT += ["train.checkpoint_every=4", "train.keep_last=9", "ema.0.decay=0.5", "data.streams=1"]


def numbers(config):
    """Losses by step, and the numbers of the last evaluation and of its validation."""
    lines = read(config.run.path / "journal.jsonl")
    by_event = {e["event"]: e["metrics"] for e in lines}
    return [e["metrics"] for e in lines if e["event"] == "train"], by_event["eval"], by_event["validation"]


@pytest.mark.parametrize("name", mostly_longer(CHOICES, ["learned"]))
def test_losses_and_bounds_are_the_same_on_one_rank_and_two_at_stages_0_and_3(digits, tmp_path, name):
    found = []
    for world_size, stage in ((1, 0), (2, 3)):
        shape = ["train.micro_batch=6", f"deepspeed.zero_stage={stage}"]
        config = tiny(digits, tmp_path / str(world_size), *CHOICES[name], *SHORT, *shape)
        trained(config, world_size)
        steps, evaluation, validation = numbers(config)
        for step in steps:
            parts = [step[f"bound_{part}"] for part in ("prior", "chain", "decoder")]
            assert step["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert evaluation["bpd"] == pytest.approx(sum(evaluation[f"bpd_{p}"] for p in ("prior", "chain", "decoder")))
        found.append([step["loss"] for step in steps] + [evaluation["bpd"], *validation.values()])
    assert found[0] == pytest.approx(found[1], rel=5e-3 if "bf16" in name else 2e-4)


@pytest.fixture(scope="module")
def learned_run(digits, tmp_path_factory):
    """The config of eight steps on two ranks at stage 2, with checkpoints at 4 and 8."""
    config = tiny(digits, tmp_path_factory.mktemp("learned"), *LEARNED, *SHORT)
    trained(config, 2)
    return config


def tensors(config, step):
    (path,) = [p for p in complete(config.run.path / "checkpoints") if p.name.endswith(f"{step:08d}")]
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


@pytest.mark.parametrize(("world_size", "stage"), [(2, 2), (1, 3)])
def test_a_resumed_run_learns_the_same_schedule_bit_for_bit_or_on_fewer_ranks(
    digits, tmp_path, learned_run, world_size, stage
):
    config = tiny(digits, tmp_path, *LEARNED, *SHORT, f"deepspeed.zero_stage={stage}")
    shutil.copytree(learned_run.run.path, config.run.path)
    RunDirectory(config.run.path).save_config(config)
    shutil.rmtree(config.run.path / "checkpoints" / "step-00000008")
    trained(config, world_size)
    once, again = tensors(learned_run, 8), tensors(config, 8)
    assert {"schedule/heights:ema_0", "schedule/rates:fp32", "schedule/offsets:exp_avg"} <= once.keys() == again.keys()
    for name, value in once.items():
        if world_size == 2:
            assert np.array_equal(again[name], value), name
        elif not name.endswith(("exp_avg", "exp_avg_sq")):
            np.testing.assert_allclose(again[name], value, rtol=1e-3, atol=2e-4, err_msg=name)
    begun = MonotoneCurve.initial_value("heights", (16,), 0).numpy()
    assert np.abs(once["schedule/heights:fp32"] - begun).max() > 0.02


def curve_of(config, key):
    network, found = MonotoneCurve(), tensors(config, 8)
    weights = {name: torch.from_numpy(found[f"schedule/{name}:{key}"]) for name in ("heights", "rates", "offsets")}
    network.load_state_dict(weights)
    return network.requires_grad_(False)


@pytest.mark.parametrize(("ema", "key"), [(0, "ema_0"), (None, "fp32")])
def test_whoever_samples_takes_the_learned_schedule_with_the_same_weights_as_the_backbone(
    tmp_path, learned_run, ema, key
):
    chosen = learned_run.eval.model_copy(update={"ema": ema})
    config = learned_run.model_copy(update={"eval": chosen})
    run = RunDirectory(config.run.path)
    generator = open_generator(run, config, torch.device("cpu")).generator
    value, _ = curve_of(config, key)(torch.tensor([0.3], dtype=torch.float64))
    assert generator.process.gamma(0.3) == pytest.approx(-13.3 + 18.3 * float(value), abs=1e-12)
    metrics, _ = evaluate(generator, config, Reference.open(config, torch.device("cpu")))
    _, of_training, _ = numbers(learned_run)
    same = [metrics[name] == pytest.approx(of_training[name], rel=1e-6) for name in ("bpd", "fd_pixels")]
    assert same == [key == "ema_0"] * 2  # the training's own evaluation is of the average
    run_images = dtrain.load(run.path, ema=ema).sample(4, steps=5, seed=3)
    export(run, tmp_path / "out", None, ema, "fp32", "safetensors")
    assert np.array_equal(dtrain.load(tmp_path / "out", ema=ema).sample(4, steps=5, seed=3), run_images)
    with pytest.raises(UserError, match="it has a network beside the backbone: name its run's checkpoint"):
        load_published(build(config), tmp_path / "out" / "model.safetensors")


def test_a_learned_schedule_has_no_place_in_others_formats(tmp_path, learned_run):
    for format in ("diffusers", "published"):
        with pytest.raises(UserError, match="take --format safetensors"):
            export(RunDirectory(learned_run.run.path), tmp_path / "out", None, 0, "fp32", format)
