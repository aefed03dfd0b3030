"""Training on latents of pictures that are encoded in each step, and what a run holds itself to."""

import json
import shutil
from typing import Literal

import numpy as np
import pytest
import torch

from dtrain.checkpoint.directory import complete
from dtrain.checkpoint.format import Checkpoint
from dtrain.config import FirstStageSection, validate
from dtrain.errors import SharedError, UserError
from dtrain.randomness import Draws, Purpose
from tests.data.shard_files import data_set, labelled_pictures, short_run
from tests.digits import losses
from tests.first_stage.folders import latent
from tests.ranks import run_ranks
from tests.training.runs import train, train_saying_into, trained


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory, autoencoder):
    """The config of 12 steps on one rank with an evaluation, whose autoencoder is the run's own copy."""
    folder = tmp_path_factory.mktemp("latent")
    shutil.copytree(autoencoder, folder / "vae")
    evaluated = ("eval.every=12", "eval.features=pixels", "eval.num_samples=48")
    config = latent(digits, folder, folder / "vae", "train.steps=12", "deepspeed.zero_stage=0", *evaluated)
    trained(config, 1)
    return config


def copied(run, digits, folder, *overrides):
    shutil.copytree(run.run.path.parent, folder, dirs_exist_ok=True)
    return latent(digits, folder, folder / "vae", "train.steps=14", "deepspeed.zero_stage=0", *overrides)


def error_of(config):
    try:
        return train(config)
    except UserError as e:
        return str(e)


def test_its_losses_do_not_depend_on_ranks_and_stages(digits, tmp_path, run, autoencoder):
    shape = ("train.steps=12", "deepspeed.zero_stage=2", "train.micro_batch=4")
    assert trained(latent(digits, tmp_path, autoencoder, *shape), 2) == pytest.approx(losses(run), rel=1e-5)


def test_x_0_is_the_posteriors_sample_by_the_image_of_the_run(digits, tmp_path, autoencoder):
    """Against a batch read by hand, diffusers' own moments and the draws of (seed, POSTERIOR, k)."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from dtrain.data.shards.manifest import load_all
    from dtrain.data.stream import Completion, StepDataset
    from dtrain.first_stage.build import build

    config = latent(digits, tmp_path, autoencoder)
    manifest = load_all(config.data)
    batch = Completion(config)(StepDataset(config, manifest, 0, 1, images=48)[0])
    noise = np.stack([Draws(config.run.seed, 2).normal(Purpose.POSTERIOR, k, (4, 4, 4)) for k in batch["k"].tolist()])
    assert batch["k"].min() == 48
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(autoencoder).encode(batch["image"]).latent_dist
    expected = (posterior.mean + posterior.std * torch.from_numpy(noise) - 0.1) * 0.8
    x_0 = build(config, manifest, torch.device("cpu")).of_batch(batch)
    torch.testing.assert_close(x_0, expected, atol=1e-5, rtol=1e-5)


def test_its_evaluation_and_checkpoint_name_the_first_stage(run):
    lines = [json.loads(line) for line in (run.run.path / "journal.jsonl").read_text().splitlines()]
    (context,) = [line["context"] for line in lines if line["event"] == "eval"]
    stated = Checkpoint.open(complete(run.run.path / "checkpoints")[-1]).meta["first_stage"]
    assert context["first_stage"] == stated["fingerprint"]
    assert stated["mean"] == [0.1] * 4
    assert stated["deviation"] == [1 / 0.8] * 4


def test_it_goes_on_where_the_folder_has_moved_and_with_no_other_one(digits, tmp_path, run):
    config = copied(run, digits, tmp_path)
    (tmp_path / "vae").rename(tmp_path / "moved")
    moved = latent(digits, tmp_path, tmp_path / "moved", *("train.steps=14", "deepspeed.zero_stage=0"))
    assert trained(moved, 1)[:12] == losses(run)
    weights = tmp_path / "moved" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # a bit of the last weight
    weights.write_bytes(bytes(content))
    longer = latent(digits, tmp_path, tmp_path / "moved", "train.steps=16", "deepspeed.zero_stage=0")
    (said,) = run_ranks(error_of, 1, longer)
    assert "another first stage" in said
    assert "\n" not in said
    assert len(losses(longer)) == 14
    (said,) = run_ranks(error_of, 1, config.model_copy(update={"first_stage": longer.first_stage}))
    assert "another first stage" in said


@pytest.mark.parametrize("override", ["first_stage.precision=bf16", "first_stage.block=2"])
def test_how_it_is_computed_with_is_part_of_the_run(digits, tmp_path, run, override):
    (said,) = run_ranks(error_of, 1, copied(run, digits, tmp_path, override))
    assert "another identity" in said


def test_ranks_with_different_autoencoders_do_not_begin(digits, tmp_path, autoencoder):
    shutil.copytree(autoencoder, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text() + "\n")
    configs = [latent(digits, tmp_path, folder) for folder in (autoencoder, tmp_path / "other")]
    said = run_ranks(error_of_own, 2, configs)
    assert said[0] == said[1]
    assert "another config of first_stage.source than rank 0" in said[0]


def error_of_own(configs):
    from dtrain import distributed

    return error_of(configs[distributed.rank()])


def test_a_scale_that_is_not_the_latents_own_is_said_after_the_first_step(digits, tmp_path, autoencoder):
    from tests.first_stage.folders import save_kl

    left_over, unsaid = save_kl(tmp_path / "new"), save_kl(tmp_path / "old", scaling_factor=None)
    said = {}
    for folder in (autoencoder, left_over, unsaid):
        log = tmp_path / f"{folder.name}.txt"
        config = latent(digits, tmp_path, folder, f"run.name={folder.name}", "train.steps=2")
        run_ranks(train_saying_into, 1, config, log)
        said[folder] = log.read_text()
    assert "first_stage.normalise=dataset" not in said[autoencoder]
    assert "scaling_factor 0.18215 (what every new AutoencoderKL has until another is set)" in said[left_over]
    assert "config.json names no scaling_factor, so diffusers' 0.18215 is taken" in said[unsaid]


class Broken:
    """No latent of a picture that is white all over."""

    fingerprint = "broken"

    def of_batch(self, batch):
        return self.encode(batch["image"])

    def encode(self, pixels):
        return pixels / (pixels.mean((1, 2, 3), keepdim=True) != 1)


class BrokenSection(FirstStageSection):
    kind: Literal["broken"]

    def build(self, config):
        return Broken()


def error_without_a_latent(plain):
    from dtrain import plugins

    plugins.register("first_stage", "broken", BrokenSection)
    try:
        return train(validate(plain, "a test"))
    except SharedError as e:
        return str(e)


def test_a_picture_whose_latent_is_not_finite_is_named_by_all_ranks(tmp_path):
    import io

    from PIL import Image

    samples = labelled_pictures(60)
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(file, "PNG")
    samples[41]["png"] = file.getvalue()
    data_set(tmp_path / "data", samples)
    plain = short_run(tmp_path, 15, on_error="raise") | {"first_stage": {"kind": "broken"}}
    first, second = run_ranks(error_without_a_latent, 2, plain)
    assert first == second
    assert "no finite latent for 1 of the pictures of a step" in first
    assert "000041.cls" in first or "000041.png" in first
