"""What a job depends on fails: each kind is survived, and the report can say that it was not."""

import os

import numpy as np
import pytest

from dtrain.chaos import surroundings
from dtrain.chaos.campaign import Undisturbed, play
from dtrain.chaos.job import Job
from dtrain.chaos.schedule import Schedule
from tests.chaos.command import DTRAIN
from tests.chaos.kills import table


def met(work, *kinds):
    """The results of one fault of each kind, in any order."""
    job = Job.make(work, None, [], 2, None, DTRAIN)
    draws = [draw for draw in surroundings.everything(job) if getattr(draw, "func", draw) in kinds]
    assert len(draws) == len(kinds)
    schedule = Schedule(job, np.random.default_rng(0), draws)
    results = list(play(job, Undisturbed.train(job), schedule.next, lambda met: not schedule.bag, launch=False))
    assert all(r.exact and r.survived for r in results), table(results)
    return {r.plan.kind: r for r in results}


pytestmark = pytest.mark.campaign  # a minute each; the suite has each fault without chaos


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small /dev/shm")
def test_workers_memory_features_and_ranks_that_fail_cost_no_loss_and_no_rank_waits(tmp_path):
    found = met(
        tmp_path,
        surroundings.killed_worker,
        surroundings.small_shared_memory,
        surroundings.lone_failure,
        surroundings.bad_features,
    )
    assert found["small shm"].ended == found["lone failure"].ended == "exit 2 / exit 2"
    assert found["worker killed"].ended == found["NaN feature"].ended == "exit 75 / exit 75"
    logs = "".join(path.read_text() for path in tmp_path.glob("round-*.log"))
    assert "Traceback" not in logs


def test_a_run_deleted_in_mlflow_and_a_key_it_refuses_lose_no_curve(tmp_path):
    assert met(tmp_path, surroundings.run_deleted, surroundings.refused_key).keys() == {"run deleted", "refused key"}
