"""A denoising GAN: 50 steps in every shape against plain PyTorch, and kills at every named point."""

import itertools

import pytest

from dtrain.faults import POINTS
from dtrain.tracking.journal import read
from tests.ranks import run_ranks
from tests.training.denoising_gan import against_critic, assert_as_by_hand, by_hand, metrics
from tests.training.runs import train

pytestmark = pytest.mark.campaign
STEPS = 50
# Of a damaged checkpoint, of averages that are kept alone, of numbers and no kills: not in a plain run.
ELSEWHERE = {"save:replace", "save:averages", "eval:features"}


@pytest.fixture(scope="module")
def expected(digits, tmp_path_factory):
    return by_hand(against_critic(digits, tmp_path_factory.mktemp("plain")), STEPS)


@pytest.mark.parametrize(("stage", "ranks", "micro"), itertools.product((0, 1, 2, 3), (1, 2), ("null", "6")))
def test_fifty_steps_equal_plain_pytorch(digits, tmp_path, expected, stage, ranks, micro):
    shape = f"deepspeed.zero_stage={stage}", f"train.micro_batch={micro}", f"train.steps={STEPS}"
    config = against_critic(digits, tmp_path, *shape)
    run_ranks(train, ranks, config)
    assert_as_by_hand(config, expected)


HOW = ("train.steps=12", "train.checkpoint_every=4", "train.micro_batch=6", "train.keep_last=1", "eval.every=6")


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def alone(request, digits, tmp_path_factory):
    shape = (*HOW, f"deepspeed.zero_stage={request.param}")
    config = against_critic(digits, tmp_path_factory.mktemp("alone"), *shape)
    run_ranks(train, 2, config)
    return config, shape


STEP_OF = {"step": 7, "save": 8, "eval": 6}


def distances(config):
    lines = [line for line in read(config.run.path / "journal.jsonl") if line["event"] == "eval"]
    return {line["step"]: line["metrics"]["fd_pixels"] for line in lines}


@pytest.mark.parametrize("point", [point for point in POINTS if point not in ELSEWHERE])
def test_killed_at_every_named_point_it_goes_on_bit_for_bit(digits, tmp_path, alone, point):
    undisturbed, shape = alone
    killed = against_critic(digits, tmp_path, *shape)
    group, schedule = point.partition(":")[0], f"sigkill_all at={point}"
    if group == "load":
        run_ranks(train, 2, against_critic(digits, tmp_path, *shape, "train.steps=8"))
    else:
        schedule += f" step={STEP_OF[group]}"
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train, 2, killed, environment={"DTRAIN_FAULTS": schedule})
    run_ranks(train, 2, killed)
    assert metrics(killed) == metrics(undisturbed)
    assert distances(killed).items() >= distances(undisturbed).items()
