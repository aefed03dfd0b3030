"""Checkpoints on a real file system that is full, or read-only, or without inodes: training goes on and says so."""

import contextlib
import os
import subprocess
import time

import pytest

from dtrain.checkpoint.directory import complete, step_of
from dtrain.checkpoint.format import Checkpoint
from dtrain.tracking.journal import events
from tests.afterwards import afterwards
from tests.digits import losses, tiny
from tests.ranks import join_ranks, run_ranks, start_ranks
from tests.training.test_loop import train, trained


@contextlib.contextmanager
def small_disk(path, options):
    """A tmpfs at `path`."""
    path.mkdir(parents=True)
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]).returncode:
        pytest.skip("mounting a small file system takes root")
    with afterwards('umount -l "$1"', str(path)):
        yield


def steps_saved(config):
    return [step_of(p) for p in complete(config.run.path / "checkpoints")]


def faults(config):
    return [e["context"]["message"] for e in events(config.run.path / "journal.jsonl") if e["event"] == "fault"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [("size=640k", "MiB free, and a checkpoint takes"), ("size=20m,nr_inodes=7", "No space left on device")],
    ids=["no room", "no inodes"],
)
def test_where_the_next_checkpoint_does_not_fit_training_goes_on_with_the_last(digits, tmp_path, options, reason):
    config = tiny(digits, tmp_path, "train.checkpoint_every=5", "train.steps=18")
    with small_disk(config.run.path / "checkpoints", options):
        with pytest.raises(RuntimeError) as error:
            run_ranks(train, 2, config)
        assert "ended at step 18, but its newest checkpoint is of step 5" in str(error.value)
        assert len(losses(config)) == 18
        assert steps_saved(config) == [5]
        assert not list((config.run.path / "checkpoints").glob("*.partial"))
        Checkpoint.open(complete(config.run.path / "checkpoints")[0]).verify()
        assert [m for m in faults(config) if reason in m and "step 10" in m]


def test_a_disk_that_turns_read_only_and_back_costs_only_time(digits, tmp_path):
    whole = trained(tiny(digits, tmp_path / "whole", "train.steps=400"), 2)
    config = tiny(digits, tmp_path / "ro", "train.checkpoint_every=10", "train.steps=400")
    place = config.run.path / "checkpoints"
    with small_disk(place, "size=20m"):
        started = start_ranks(train, 2, config)
        end = time.monotonic() + 60
        while not steps_saved(config):
            assert time.monotonic() < end
            time.sleep(0.005)
        turned = subprocess.run(["mount", "-o", "remount,ro", place])
        while turned.returncode and time.monotonic() < end:  # busy while a file is being written
            turned = subprocess.run(["mount", "-o", "remount,ro", place], capture_output=True)
        with pytest.raises(RuntimeError, match="ended at step 400, but its newest checkpoint is of step"):
            join_ranks(started)
        assert losses(config) == whole
        assert any("Read-only file system" in message for message in faults(config))
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        assert trained(config, 2) == whole
        assert steps_saved(config)[-1] == 400
