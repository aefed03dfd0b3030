"""Gradients reduced in several buckets, while the backward pass goes on, with blocks compiled and not."""

from functools import partial

import pytest

from dtrain.config import DeepSpeed
from dtrain.config.training import BUCKETS, LARGEST_BUCKET, SMALLEST_BUCKET
from dtrain.training.options import deepspeed_options
from tests.digits import losses, tiny
from tests.longer import longer
from tests.ranks import run_ranks

# As on GPUs, where several ranks have a larger model: what is reduced is not what is being filled.
OVERLAP = "deepspeed.extra={zero_optimization: {overlap_comm: true, reduce_bucket_size: 5000}}"
WHOLE = "deepspeed.extra={}"


def train(config) -> None:
    """With a backend that traces forward and backward and writes no C++, which would take a minute."""
    from dtrain.models.compiled import compile_blocks
    from dtrain.training import player
    from dtrain.training.run_training import train

    player.compile_blocks = partial(compile_blocks, backend="aot_eager")
    train(config)


@pytest.fixture(scope="module", params=[1, 2])
def stage(request):
    return request.param


@pytest.fixture(scope="module")
def losses_of(digits, tmp_path_factory, stage):
    def of(*overrides):
        folder = tmp_path_factory.mktemp("buckets")
        config = tiny(digits, folder, f"deepspeed.zero_stage={stage}", "train.steps=8", *overrides)
        run_ranks(train, 2, config)
        return losses(config)

    return of


@pytest.fixture(scope="module")
def in_one_bucket(losses_of):
    return losses_of(WHOLE)


def test_buckets_and_overlap_change_no_bit_on_two_ranks(losses_of, in_one_bucket):
    assert losses_of(OVERLAP) == in_one_bucket


@pytest.mark.parametrize("checkpointing", [longer("false"), "true"])
def test_compiled_blocks_train_alike_with_buckets_and_overlap(losses_of, in_one_bucket, checkpointing):
    found = losses_of(OVERLAP, "train.compile=blocks", f"train.activation_checkpointing={checkpointing}")
    assert found == pytest.approx(in_one_bucket, abs=1e-5)  # which no NaN is


def test_a_model_is_reduced_in_several_buckets_where_it_is_large_enough():
    section = DeepSpeed()
    for stage in (1, 2):
        assert section.bucket(1_000, stage) == 1_000
        assert section.bucket(33_000_000, stage) == SMALLEST_BUCKET  # DiT-S/2 in five
        assert section.bucket(675_000_000, stage) == -(-675_000_000 // BUCKETS)  # DiT-XL/2
        assert section.bucket(10**11, stage) == LARGEST_BUCKET
    assert section.bucket(675_000_000, 3) == LARGEST_BUCKET
    assert DeepSpeed(extra={"zero_optimization": {"reduce_bucket_size": 77}}).bucket(10**9, 2) == 77


def test_deepspeed_is_given_that_bucket(digits, tmp_path):
    options = deepspeed_options(tiny(digits, tmp_path), 2, 12, 33_000_000)["zero_optimization"]
    assert options["reduce_bucket_size"] == SMALLEST_BUCKET
