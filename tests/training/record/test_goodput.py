"""An attempt's time by kind: it adds up to the wall time, within what a clock outside saw."""

import time

import pytest

from dtrain.position import Position
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events
from dtrain.tracking.tracker import Tracker
from dtrain.training.record.goodput import KINDS, Goodput
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.runs import kill_when, train


def lines(config, event="goodput"):
    return [line for line in events(config.run.path / "journal.jsonl") if line["event"] == event]


def assert_adds_up(metrics):
    assert sum(metrics[kind] for kind in KINDS) == pytest.approx(metrics["wall_s"], abs=1e-6)
    assert all(metrics[kind] >= 0 for kind in KINDS)
    assert metrics["share"] == pytest.approx(metrics["productive_s"] / metrics["wall_s"])


def test_the_kinds_add_up_to_the_wall_time_that_a_clock_outside_saw(digits, tmp_path):
    config = tiny(digits, tmp_path, "eval.every=5", "train.steps=10", "train.checkpoint_every=5")
    before = time.time()
    run_ranks(train, 2, config)
    outside = time.time() - before
    metrics = lines(config)[-1]["metrics"]
    assert_adds_up(metrics)
    assert all(metrics[kind] > 0 for kind in KINDS if kind != "bad_step_s")
    assert metrics["bad_step_s"] == metrics["lost_steps"] == metrics["refused_images"] == 0
    between = lines(config)[-1]["time"] - lines(config, "attempt")[0]["time"]
    assert between - 0.1 <= metrics["wall_s"] <= outside + 0.1
    reported = sum(line["metrics"]["seconds"] for line in lines(config, "eval"))
    assert metrics["evaluation_s"] >= reported - 0.1


def test_going_back_ends_an_attempt_and_its_steps_are_lost(digits, tmp_path):
    config = tiny(digits, tmp_path, "train.steps=9", "train.checkpoint_every=3", "train.bad_steps=2")
    before = time.time()
    run_ranks(train, 2, config, environment={"DTRAIN_FAULTS": "nan images=120:168"})
    outside = time.time() - before
    first, second = ([line["metrics"] for line in lines(config) if line["attempt"] == a][-1] for a in (1, 2))
    for metrics in (first, second):
        assert_adds_up(metrics)
        assert metrics["restart_s"] > 0
    assert first["wall_s"] + second["wall_s"] <= outside + 0.1
    assert (first["refused_images"], second["refused_images"]) == (48, 0)
    assert first["bad_step_s"] > 0 == second["bad_step_s"]
    assert (first["lost_steps"], second["lost_steps"]) == (0, 2)  # steps 4 and 5, gone through again


def test_a_kill_costs_the_steps_after_the_checkpoint(digits, tmp_path):
    config = tiny(digits, tmp_path, "train.checkpoint_every=4", "train.steps=60")
    kill_when(config, 2, 7)
    reached = max(line["step"] for line in lines(config, "train"))
    run_ranks(train, 2, config)
    began = lines(config, "attempt")[1]["step"]
    assert lines(config)[-1]["metrics"]["lost_steps"] == reached - began


def test_a_refused_step_is_time_lost_and_data_waited_for_is_not_productive(tmp_path):
    goodput = Goodput(Tracker(RunDirectory(tmp_path), 1), age=5.0)
    goodput.train()
    time.sleep(0.05)
    goodput.step(True, 0.02, 24)
    time.sleep(0.05)
    with goodput.during("evaluation_s"):
        time.sleep(0.01)
    goodput.step(False, 0.02, 24)
    metrics = goodput.metrics()
    assert_adds_up(metrics)
    assert metrics["restart_s"] >= 5
    assert metrics["data_wait_s"] == pytest.approx(0.02)
    assert metrics["productive_s"] >= 0.03
    assert metrics["bad_step_s"] >= 0.05
    assert metrics["refused_images"] == 24
    goodput.end_attempt(Position(1, 48))
    assert goodput.metrics()["productive_s"] == 0
