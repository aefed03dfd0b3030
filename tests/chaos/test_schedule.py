"""The schedule: the same for a seed, every kind in it, each planned for a moment that the run still has before it."""

import os
from functools import partial

import numpy as np
import pytest

from dtrain.chaos.job import Job
from dtrain.chaos.plan import State
from dtrain.chaos.schedule import Schedule, everything, kill_while_replacing
from dtrain.faults import Fault
from tests.chaos.command import DTRAIN
from tests.digits import tiny


@pytest.fixture
def job(digits, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny(digits, tmp_path / "runs", "eval.every=5").dump())
    work = tmp_path / "work"
    work.mkdir()
    return Job.make(work, tmp_path / "tiny.yaml", ["model.width=16"], 2, tmp_path / "disk", DTRAIN)


def states(job):
    for step in range(0, job.config.train.steps, 6):
        for damaged in ((), (step + 6,)):
            yield State(step, min(3, step // 6), damaged, job.shape, job.config.train.steps)


def plans(job, seed, number=60):
    schedule, rng = Schedule(job, np.random.default_rng(seed)), np.random.default_rng(0)
    given = list(states(job))
    found = []
    while len(found) < number:
        if (plan := schedule.next(given[rng.integers(len(given))])) is not None:
            found.append(plan)
    return found


def test_a_seed_gives_the_same_faults_and_another_others(job):
    assert plans(job, 1) == plans(job, 1)
    assert plans(job, 1) != plans(job, 2)


def test_every_kind_can_happen_and_is_planned_for_steps_that_are_to_come(job):
    kinds = set()
    for draw in everything(job):
        could = []
        for state in states(job):
            plan = draw(state, np.random.default_rng(state.step))
            if plan is None:
                continue
            could.append(plan)
            for text in filter(None, (plan.schedule + ";" + plan.poison).split(";")):
                fault = Fault.parse(text)
                assert fault.step is None or state.step < fault.step <= state.steps
                assert fault.rank is None or fault.rank < state.shape.ranks
        assert could, draw
        kinds |= {plan.kind for plan in could}
    assert kinds == {
        *("SIGKILL of one", "SIGKILL of all", "SIGTERM", "damage", "damaged shard", "another shape"),
        *("full disk", "MLflow gone", "run deleted", "refused key", "NaN", "NaN feature", "stall"),
        *("worker killed", "lone failure", *(["small shm"] if os.geteuid() == 0 else [])),
    }


def test_no_kill_waits_for_a_save_that_does_not_come(job):
    draw = partial(kill_while_replacing, job, "one")
    for damaged, possible in ((18, True), (15, False)):  # 15: of a stop
        state = State(12, 2, (damaged,), job.shape, job.config.train.steps)
        assert (draw(state, np.random.default_rng(0)) is not None) == possible


def test_a_job_is_the_users_config_made_short_and_what_the_user_says_comes_last(job):
    c = job.config
    assert (c.train.steps, c.train.checkpoint_every, c.eval.every) == (72, 6, 12)
    assert (c.model.width, c.model.depth) == (16, 1)
    assert not c.tracking.enabled
    assert job.run("round-001").path == job.disk / "runs" / "round-001"
    with_steps = Job.make(job.work, job.file, ["train.steps=40", "run.dir=elsewhere"], 2, None, DTRAIN)
    assert with_steps.config.train.steps == 40
