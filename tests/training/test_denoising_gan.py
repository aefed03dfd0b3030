"""A denoising GAN through the whole training: plain PyTorch's losses in every shape, kills, refusals, its samples."""

import numpy as np
import pytest

import dtrain
from dtrain.errors import UserError
from dtrain.tracking.journal import read
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.denoising_gan import against_critic, assert_as_by_hand, by_hand, metrics
from tests.training.runs import train

STEPS = 10


@pytest.fixture(scope="module")
def expected(digits, tmp_path_factory):
    return by_hand(against_critic(digits, tmp_path_factory.mktemp("plain")), STEPS)


@pytest.mark.parametrize(("stage", "ranks", "micro"), [(0, 1, "null"), (2, 2, "6"), (3, 2, "6")])
def test_its_losses_are_those_of_plain_pytorch(digits, tmp_path, expected, stage, ranks, micro):
    shape = f"deepspeed.zero_stage={stage}", f"train.micro_batch={micro}", f"train.steps={STEPS}"
    config = against_critic(digits, tmp_path, *shape)
    run_ranks(train, ranks, config)
    assert_as_by_hand(config, expected)


def test_killed_between_its_turns_it_goes_on_bit_for_bit(digits, tmp_path):
    how = "train.steps=9", "train.checkpoint_every=4", "train.micro_batch=6", "deepspeed.zero_stage=2"
    alone, killed = (against_critic(digits, tmp_path, *how, f"run.name={name}") for name in ("alone", "killed"))
    run_ranks(train, 2, alone)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train, 2, killed, environment={"DTRAIN_FAULTS": "sigkill_all at=step:moved step=6"})
    run_ranks(train, 2, killed)
    assert metrics(killed) == metrics(alone)


def test_two_ranks_at_stage_2_go_on_as_one_at_stage_3(digits, tmp_path):
    long = "train.steps=8", "train.micro_batch=6"
    alone = against_critic(digits, tmp_path, *long, "run.name=alone")
    run_ranks(train, 1, alone)
    run_ranks(train, 2, against_critic(digits, tmp_path, *long, "train.steps=4", "deepspeed.zero_stage=2"))
    resumed = against_critic(digits, tmp_path, *long, "deepspeed.zero_stage=3")
    run_ranks(train, 1, resumed)
    for ours, theirs in zip(metrics(resumed), metrics(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    config = against_critic(digits, tmp_path_factory.mktemp("finished"), "train.steps=6", "eval.every=6")
    run_ranks(train, 1, config)
    return config


def test_it_draws_with_numbers_of_its_own_the_same_in_every_block(digits, finished):
    run = dtrain.load(finished.run.path)
    ours, again = run.sample(6, seed=1), run.sample(6, seed=1)
    assert ours.shape == (6, 8, 8, 1)
    assert np.array_equal(ours, again)
    assert np.abs(ours.astype(int) - run.sample(6, seed=2)).max() > 0
    (line,) = [line for line in read(finished.run.path / "journal.jsonl") if line["event"] == "eval"]
    assert line["context"]["sampler"] == "ancestral"
    assert line["context"]["steps"] == 4
    assert not [name for name in line["metrics"] if name.startswith("loss")]


def test_what_cannot_go_with_it_is_refused_in_one_line(digits, finished, tmp_path):
    cases = {
        "eval.guidance=2": "draws samples and no means to lead; take 1",
        "eval.steps=3": "must be diffusion.timesteps, 4",
        "eval.sampler=ddim": "does not walk a ddgan process; take ancestral",
        "eval.metrics=[bpd]": "is the bound of a gaussian process",
        "eval.spacing=quad": "ddgan, which takes every timestep",
        "conditions.text={}": "its critic judges the class alone",
        "model.adapt={of: runs/x}": "frozen base, which is told no latent",
        "diffusion.timesteps=9": "less than or equal to 8",
    }
    for override, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            against_critic(digits, tmp_path, override)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="each of its steps draws anew"):
        dtrain.load(finished.run.path).invert(np.zeros((1, 8, 8, 1), np.uint8))


def test_its_steps_are_its_timesteps_unless_the_config_says_so(digits, tmp_path):
    assert tiny(digits, tmp_path, "diffusion={process: ddgan, timesteps: 2}", "eval={}").eval.steps == 2
