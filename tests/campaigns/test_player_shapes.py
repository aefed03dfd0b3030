"""Several networks and several optimizers in every way DeepSpeed can be asked to hold them, against plain PyTorch."""

import itertools

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.training.toys import KINDS, STEPS, assert_close, by_plain_pytorch, config_of, train

pytestmark = pytest.mark.campaign

WAYS = {
    "offload-2": (2, "deepspeed.offload=optimizer"),
    "offload-3": (3, "deepspeed.offload=all"),
    "sub-groups": (3, "deepspeed.extra={zero_optimization: {sub_group_size: 100}}"),
    "partitioned": (3, "deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}"),
    "whole": (3, "deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 1000000}}"),
    **{f"compiled-{stage}": (stage, "train.compile=true") for stage in (0, 1, 3)},
}


@pytest.fixture(scope="module")
def expected(digits, tmp_path_factory):
    return by_plain_pytorch(digits, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_ten_steps_equal_plain_pytorch(digits, tmp_path, expected, kind, way):
    config = config_of(digits, tmp_path, *WAYS[way])
    assert_close(run_ranks(train, 2, KINDS[kind], config, range(STEPS), timeout=600), expected[kind])


SHAPES = [
    *(("deepspeed.precision=bf16_autocast", kind, stage) for kind, stage in itertools.product(KINDS, (0, 1, 2, 3))),
    *(("deepspeed.precision=bf16", "adversarial", stage) for stage in (1, 2, 3)),
]


@pytest.mark.parametrize(("precision", "kind", "stage"), SHAPES)
def test_norms_in_bf16_stay_within_its_rounding_of_plain_pytorch(digits, tmp_path, expected, precision, kind, stage):
    for _, norms, _ in run_ranks(train, 2, KINDS[kind], config_of(digits, tmp_path, stage, precision), range(STEPS)):
        for one, other in zip(norms, expected[kind][1], strict=True):
            assert one == pytest.approx(other, rel=5e-2)
            assert all(np.isfinite(list(one.values())))
