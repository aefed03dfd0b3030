"""An autoencoder against a critic: {stage 0, 1, 2, 3} × {1, 2 ranks} × {micro-batch}, 50 steps."""

import itertools

import pytest

from tests.training.critic import assert_same, series

pytestmark = pytest.mark.campaign
STEPS = 50


@pytest.fixture(scope="module")
def reference(digits, tmp_path_factory):
    return series(digits, tmp_path_factory.mktemp("reference"), STEPS, 0, 1, "null")


@pytest.mark.parametrize(("stage", "ranks", "micro"), itertools.product((0, 1, 2, 3), (1, 2), ("null", "4")))
def test_the_same_losses_in_every_shape(digits, tmp_path, reference, stage, ranks, micro):
    assert_same(series(digits, tmp_path, STEPS, stage, ranks, micro), reference)
