"""Trainings on real ranks: functions for `run_ranks`, and waiting for a run, or killing it, at a step."""

import contextlib
import os
import shutil
import signal
import time

from dtrain.run import RunDirectory
from dtrain.tracking.journal import events
from tests.digits import losses, tiny
from tests.ranks import run_ranks, start_ranks

# Never done: for a run that a test ends.
LONG = ("train.steps=100000", "train.checkpoint_every=100000")
# The run of the fixture `finished_run`: checkpoints and evaluations at 10, 20, 30 and 40. Its streams are named, as a
# run keeps the number that it began with.
FINISHED = (
    *("train.steps=40", "train.checkpoint_every=10", "train.keep_last=9", "eval.every=10"),
    *("ema.0.decay=0.8", "data.streams=1"),
)


def train(config):
    """On a rank: the whole training; returns its outcome."""
    from dtrain.training.run_training import train as run_training

    return run_training(config)


def train_saying_into(config, path):
    """The same, what it prints appended to a file."""
    with path.open("a") as said, contextlib.redirect_stdout(said):
        train(config)


def trained(config, world_size):
    """Train on forked ranks; returns the loss of each step."""
    run_ranks(train, world_size, config)
    return losses(config)


def copied(run, digits, folder, *overrides):
    """A copy, in `folder`, of a run of FINISHED; returns its config, which differs by `overrides` alone."""
    config = tiny(digits, folder, *FINISHED, *overrides)
    shutil.copytree(run.run.path, config.run.path)
    RunDirectory(config.run.path).save_config(config)
    return config


def kill_when(config, world_size, step):
    """Start ranks and SIGKILL all as soon as they are past `step` and a checkpoint was made since `step` − 5."""
    started = start_ranks(train, world_size, config)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        lines = events(config.run.path / "journal.jsonl")
        trained_to = max((e["step"] for e in lines if e["event"] == "train"), default=0)
        saved_to = max((e["step"] for e in lines if e["event"] == "checkpoint"), default=0)
        if trained_to >= step and saved_to >= step - 5:
            break
        assert all(p.is_alive() for p, _ in started), "a rank ended before it was killed"
        time.sleep(0.005)
    for process, _ in started:
        os.kill(process.pid, signal.SIGKILL)
    for process, _ in started:
        process.join()


def wait_for_step(config, step, timeout=60.0):
    """Wait until the journal has a step this late; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while (
        max((e["step"] for e in events(config.run.path / "journal.jsonl") if e["event"] == "train"), default=0) < step
    ):
        assert time.monotonic() < end, f"step {step} was not reached within {timeout} s"
        time.sleep(0.005)
