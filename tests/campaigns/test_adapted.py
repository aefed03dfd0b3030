"""Low-rank adapters in {stage 0, 1, 2, 3} × {1, 2 ranks}, 20 steps, whole and killed; and what the base forgets."""

import itertools
import json

import numpy as np
import pytest

from tests.command_line import command
from tests.digits import losses
from tests.ranks import run_ranks
from tests.training.control import evaluations, newest
from tests.training.lora import adapted
from tests.training.runs import kill_when, train, trained

pytestmark = pytest.mark.campaign

LONGER = ("train.steps=20", "train.checkpoint_every=5", "eval.every=10")


@pytest.fixture(scope="module")
def reference(digits, finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    config = adapted(digits, folder, finished_run.run.path, *LONGER, "deepspeed.zero_stage=0")
    run_ranks(train, 1, config)
    return config


@pytest.mark.parametrize(("stage", "ranks", "micro"), itertools.product((0, 1, 2, 3), (1, 2), ("null", "4")))
def test_the_same_losses_and_evaluations_in_every_shape(digits, tmp_path, finished_run, reference, stage, ranks, micro):
    shape = f"deepspeed.zero_stage={stage}", f"train.micro_batch={micro}"
    config = adapted(digits, tmp_path, finished_run.run.path, *LONGER, *shape)
    assert trained(config, ranks) == pytest.approx(losses(reference), rel=1e-5)
    for step, metrics in evaluations(reference).items():
        assert evaluations(config)[step] == pytest.approx(metrics, rel=1e-3), step


@pytest.mark.parametrize(("stage", "ranks"), itertools.product((0, 1, 2, 3), (1, 2)))
def test_killed_and_resumed_bit_for_bit(digits, tmp_path, finished_run, stage, ranks):
    shape = *LONGER, f"deepspeed.zero_stage={stage}"
    whole = adapted(digits, tmp_path, finished_run.run.path, *shape, "run.name=whole")
    run_ranks(train, ranks, whole)
    config = adapted(digits, tmp_path, finished_run.run.path, *shape, "run.name=killed")
    kill_when(config, ranks, 8)
    run_ranks(train, ranks, config)
    ours, theirs = newest(config), newest(whole)
    assert ours.meta["step"] == theirs.meta["step"] == 20
    for name in theirs.tensors:
        assert np.array_equal(ours.tensor(name), theirs.tensor(name)), name
    assert losses(config) == losses(whole)


def test_what_is_forgotten_is_a_distance_of_both_to_the_bases_own_data(digits, tmp_path, finished_run, reference):
    made = ["reference", digits / "holdout", "--features", "pixels", "--out", tmp_path / "base.npz"]
    [(code, said)] = run_ranks(command, 1, *made)
    assert not code, said
    found = []
    for run in (finished_run, reference):
        options = ["--features", "pixels", "--reference", tmp_path / "base.npz", "--n", "48", "--json"]
        [(code, said)] = run_ranks(command, 1, "evaluate", run.run.path, *options)
        assert not code, said
        found.append(json.loads(said.splitlines()[-1])["metrics"]["fd_pixels"])
    assert found[0] != found[1]
    print(f"of the base {found[0]:.3f}, adapted {found[1]:.3f}")
