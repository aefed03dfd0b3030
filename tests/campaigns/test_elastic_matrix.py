"""Every shape's checkpoint resumed in every shape: {stage 0, 1, 2, 3} × {1, 2, 3 ranks} squared, 100 steps."""

import numpy as np
import pytest

from tests.digits import tiny
from tests.training.elastic import resume_elsewhere, shape, tensors, write
from tests.training.runs import trained

pytestmark = pytest.mark.campaign
STEPS = 110
SHAPES = [(stage, world_size) for stage in (0, 1, 2, 3) for world_size in (1, 2, 3)]


@pytest.fixture(scope="module")
def reference(digits, tmp_path_factory):
    return trained(tiny(digits, tmp_path_factory.mktemp("reference"), *shape(0), f"train.steps={STEPS}"), 1)


@pytest.fixture(scope="module")
def written(digits, tmp_path_factory):
    """Shape → a run of ten steps in it."""
    place = tmp_path_factory.mktemp("written")
    return {s: write(digits, place / f"{s[0]}-{s[1]}", shape(s[0]), s[1]) for s in SHAPES}


@pytest.mark.parametrize("read", SHAPES, ids=lambda s: f"to-stage{s[0]}-{s[1]}ranks")
@pytest.mark.parametrize("source", SHAPES, ids=lambda s: f"stage{s[0]}-{s[1]}ranks")
def test_every_pair(digits, tmp_path, reference, written, source, read):
    got, loaded = resume_elsewhere(digits, written[source], tmp_path / "read", shape(read[0]), read[1], STEPS)
    saved = tensors(written[source])
    assert all(np.array_equal(saved[name], loaded[name]) for name in saved)
    assert got == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_run_at_any_world_size_and_micro_batch(digits, tmp_path, reference, stage, world_size, micro):
    config = tiny(digits, tmp_path, *shape(stage), f"train.steps={STEPS}", f"train.micro_batch={micro or 'null'}")
    assert trained(config, world_size) == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("what", ["true", "blocks"])
def test_compiled(digits, tmp_path, reference, stage, checkpointing, what):
    more = [f"train.compile={what}", f"train.activation_checkpointing={str(checkpointing).lower()}", "train.steps=20"]
    assert trained(tiny(digits, tmp_path, *shape(stage), *more), 2) == pytest.approx(reference[:20], abs=1e-5)
