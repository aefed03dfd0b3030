"""Variational diffusion: bits of held-out digits, and a learned schedule in every shape."""

import itertools
import os

import numpy as np
import pytest

from dtrain.checkpoint.directory import complete
from dtrain.checkpoint.format import Checkpoint
from dtrain.config import load
from dtrain.tracking.journal import read
from tests.digits import CONFIG, losses, tiny
from tests.ranks import run_ranks
from tests.training.runs import kill_when, train, trained

pytestmark = pytest.mark.campaign

CHOICES = {"fixed": [], "learned": ["diffusion.schedule=learned", "diffusion.schedule_lr_factor=10"]}


@pytest.mark.parametrize("name", CHOICES)
def test_the_shipped_config_reaches_four_bits_a_pixel_of_held_out_digits(digits, tmp_path, name):
    own = f"data.shards={digits}/train", f"data.holdout={digits}/holdout/manifest.json", f"run.dir={tmp_path}"
    seed = f"run.seed={os.environ.get('DTRAIN_SEED', '0')}"
    config = load(CONFIG.parent / "digits-vdm.yaml", [*own, seed, "tracking.enabled=false", *CHOICES[name]])
    run_ranks(train, 2, config, timeout=3600)
    found = {e["step"]: e["metrics"]["bpd"] for e in read(config.run.path / "journal.jsonl") if e["event"] == "eval"}
    print(name, {step: round(value, 3) for step, value in found.items()})
    assert found[config.train.steps] < 4.0


LEARNED = ["diffusion={process: vdm, schedule: learned, schedule_lr_factor: 50, stratified: true}", "train.steps=20"]
LEARNED += ["eval.every=10", "eval.metrics=[fd, bpd]", "eval.validation_images=20", "eval.num_samples=24"]
LEARNED += ["train.checkpoint_every=5", "data.streams=1"]


@pytest.fixture(scope="module")
def reference(digits, tmp_path_factory):
    config = tiny(digits, tmp_path_factory.mktemp("reference"), *LEARNED)
    trained(config, 1)
    return config


def evaluations(config):
    return [e["metrics"]["bpd"] for e in read(config.run.path / "journal.jsonl") if e["event"] == "eval"]


def newest(config):
    checkpoint = Checkpoint.open(complete(config.run.path / "checkpoints")[-1])
    assert checkpoint.meta["step"] == 20
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


@pytest.mark.parametrize(("stage", "ranks", "micro"), itertools.product((0, 1, 2, 3), (1, 2), ("null", "4")))
def test_a_learned_schedule_is_the_same_in_every_shape(digits, tmp_path, reference, stage, ranks, micro):
    config = tiny(digits, tmp_path, *LEARNED, f"deepspeed.zero_stage={stage}", f"train.micro_batch={micro}")
    assert trained(config, ranks) == pytest.approx(losses(reference), rel=2e-5)
    assert evaluations(config) == pytest.approx(evaluations(reference), rel=1e-4)


@pytest.mark.parametrize(("stage", "ranks"), itertools.product((0, 1, 2, 3), (1, 2)))
def test_killed_and_resumed_a_schedule_is_learned_bit_for_bit(digits, tmp_path, stage, ranks):
    shape = *LEARNED, f"deepspeed.zero_stage={stage}"
    whole, config = (tiny(digits, tmp_path / name, *shape) for name in ("whole", "killed"))
    trained(whole, ranks)
    kill_when(config, ranks, 8)
    trained(config, ranks)
    ours, theirs = newest(config), newest(whole)
    for name in theirs:
        assert np.array_equal(ours[name], theirs[name]), name
    assert losses(config) == losses(whole)
