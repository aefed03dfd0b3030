"""The picture is obeyed: digits in an ink mask, on a base that stays what it was; and control in every shape.

DTRAIN_CONTROL_BASE: a run of configs/digits-dit.yaml, which is trained here otherwise.
"""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import dtrain
from dtrain.checkpoint.frozen_base import fingerprint, read_base
from dtrain.config import load
from dtrain.evaluation.control import HeldOutPictures, agreement
from dtrain.evaluation.sample import draw, together
from tests.digits import CONFIG, losses
from tests.ranks import run_ranks
from tests.training.control import controlled, evaluations, file_of, newest, unet
from tests.training.runs import kill_when, train, trained

pytestmark = pytest.mark.campaign

SAMPLES = 2000


def of(name, digits, folder, *overrides):
    own = (f"data.shards={digits}/train", f"data.holdout={digits}/holdout/manifest.json", f"run.dir={folder}")
    seed = f"run.seed={os.environ.get('DTRAIN_SEED', '0')}"
    return load(CONFIG.parent / name, [*own, seed, "tracking.enabled=false", "data.workers=0", *overrides])


def obeyed(config, scale):
    """The share of equal cells of SAMPLES samples, asked for the masks and classes of held-out digits."""
    from dtrain.data.fields.samples import read_labels
    from dtrain.data.shards.manifest import load_holdout

    model = dtrain.load(config.run.path)
    split = load_holdout(config.data)
    pictures = HeldOutPictures(config, split, None)
    ids = list(range(SAMPLES))
    labels = read_labels(split, split.place)[torch.tensor(ids) % split.samples]
    settings = model._with_eval({"control_scale": {"ink": scale}}, "the test")
    generator = model._generator(settings)
    images = together(draw(generator, labels, settings.eval, said=pictures.of(ids)), SAMPLES)
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    total, count = agreement(generator.conditions, ids, images, pictures.of(ids))["ink"]
    return total / count


def test_digits_are_drawn_into_the_mask(digits, tmp_path):
    given = os.environ.get("DTRAIN_CONTROL_BASE")
    if given is None:
        run_ranks(train, 1, of("digits-dit.yaml", digits, tmp_path, "eval.every=0"), timeout=7200)
    place = Path(given or tmp_path / "digits")
    config = of("digits-control.yaml", digits, tmp_path, f"model.control_of={place}")
    before = fingerprint(read_base(str(place), config.base))
    run_ranks(train, 1, config, timeout=7200)
    assert fingerprint(read_base(str(place), config.base)) == newest(config).meta["held"]["base"] == before
    curve = {step: metrics["control_ink"] for step, metrics in evaluations(config).items()}
    with_control = obeyed(config, 1.0)
    without = obeyed(config, 0.0)
    print(f"curve {curve}; with control {with_control:.4f}, without {without:.4f}")
    assert with_control >= 0.96
    assert without < 0.92
    bare = dtrain.load(place)
    labels = (np.arange(64) % 10).tolist()
    ours = dtrain.load(config.run.path).sample(labels=labels, control_scale=0)
    assert np.array_equal(ours, bare.sample(labels=labels))


def base_of(kind, digits, folder, finished_run):
    """(a base, the overrides that name it)."""
    if kind == "dit":
        return finished_run.run.path, ()
    from tests.digits import tiny

    file = file_of(tiny(digits, folder, unet()), folder / "base.safetensors")
    return file, (unet(f"control_of: {file}"),)


LONGER = ("train.steps=20", "train.checkpoint_every=5", "eval.every=10")


@pytest.fixture(scope="module", params=["dit", "unet"])
def reference(request, digits, finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base, more = base_of(request.param, digits, folder, finished_run)
    config = controlled(digits, folder, base, *more, *LONGER, "deepspeed.zero_stage=0")
    run_ranks(train, 1, config)
    return base, more, config


@pytest.mark.parametrize(("stage", "ranks", "micro"), itertools.product((0, 1, 2, 3), (1, 2), ("null", "4")))
def test_the_same_losses_and_evaluations_in_every_shape(digits, tmp_path, reference, stage, ranks, micro):
    base, more, one = reference
    shape = f"deepspeed.zero_stage={stage}", f"train.micro_batch={micro}"
    config = controlled(digits, tmp_path, base, *more, *LONGER, *shape)
    assert trained(config, ranks) == pytest.approx(losses(one), rel=1e-5)
    for step, metrics in evaluations(one).items():
        assert evaluations(config)[step] == pytest.approx(metrics, rel=1e-3), step


@pytest.mark.parametrize(("stage", "ranks"), itertools.product((0, 1, 2, 3), (1, 2)))
def test_killed_and_resumed_bit_for_bit(digits, tmp_path, reference, stage, ranks):
    base, more, _ = reference
    shape = *more, *LONGER, f"deepspeed.zero_stage={stage}"
    whole = controlled(digits, tmp_path, base, *shape, "run.name=whole")
    run_ranks(train, ranks, whole)
    config = controlled(digits, tmp_path, base, *shape, "run.name=killed")
    kill_when(config, ranks, 8)
    run_ranks(train, ranks, config)
    ours, theirs = newest(config), newest(whole)
    assert ours.meta["step"] == theirs.meta["step"] == 20
    for name in theirs.tensors:
        assert np.array_equal(ours.tensor(name), theirs.tensor(name)), name
    assert losses(config) == losses(whole)
    assert evaluations(config)[20] == evaluations(whole)[20]
