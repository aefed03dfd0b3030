"""Checkpoints on a real file system that is full, or read-only, or without inodes: training goes on and says so."""

import subprocess
import time

import pytest

from dtrain.checkpoint.directory import complete, step_of
from dtrain.checkpoint.format import Checkpoint
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events
from dtrain.tracking.tracker import sync
from tests.digits import losses, tiny
from tests.longer import longer
from tests.ranks import join_ranks, run_ranks, start_ranks
from tests.small_disk import small_disk
from tests.training.runs import train, trained


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


@pytest.mark.campaign
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


def filled(disk, point, until=None):
    """The schedule that fills `disk` at a point, and again what is left before each step, with room once more at one.

    A save that fails gives its space back.
    """
    first = int(point.partition("step=")[2])
    whens = [point, *(f"step step={step}" for step in range(first + 1, until or 100))]
    faults = [f"fill at={when} path={disk}/filler rank=0" for when in whens]
    if until:
        faults.append(f"free at=step step={until} path={disk}/filler rank=0")
    return {"DTRAIN_FAULTS": "; ".join(faults)}


OFTEN = ("train.checkpoint_every=4", "train.steps=24", "eval.every=8", "tracking.system_every=0.05")


@pytest.mark.parametrize(
    "point",
    ["save:stage step=8", "save:write step=8", longer("save:fsync step=8"), longer("save:commit step=8")],
)
def test_a_disk_full_for_a_while_costs_checkpoints_and_pictures_but_no_line_of_the_journal(
    digits, finished_run, tmp_path, point
):
    config = tiny(digits, tmp_path / "disk", *OFTEN)
    with small_disk(tmp_path / "disk", "size=20m"):
        run_ranks(train, 2, config, environment=filled(tmp_path / "disk", point, 18))
        assert losses(config) == losses(finished_run)[:24]
        assert not (config.run.path / "samples" / "step-00000016.png").exists()
        lines = events(config.run.path / "journal.jsonl")
        assert [e["step"] for e in lines if e["event"] == "eval"] == [8, 16, 24]
        assert [e["step"] for e in lines if e["event"] == "checkpoint"] == [4, 20, 24]
        assert [m for m in faults(config) if "step 8 was not saved" in m]
        assert [m for m in faults(config) if "step 16 was not saved" in m]
        for path in complete(config.run.path / "checkpoints"):
            Checkpoint.open(path).verify()
        assert RunDirectory(config.run.path).outcome()["outcome"] == "finished"


def test_a_stop_after_a_checkpoint_that_failed_ends_in_one_where_there_is_room_again(digits, tmp_path):
    config = tiny(digits, tmp_path / "disk", "train.checkpoint_every=10", "train.steps=30", "eval.every=8")
    with small_disk(tmp_path / "disk", "size=20m"):
        schedule = filled(tmp_path / "disk", "step step=10", 12)
        schedule["DTRAIN_FAULTS"] += "; sigterm at=step step=16 rank=1"
        run_ranks(train, 2, config, environment=schedule)
        assert [m for m in faults(config) if "step 10 was not saved" in m]
        assert steps_saved(config) == [16]
        assert RunDirectory(config.run.path).outcome()["outcome"] == "stopped"


def test_a_disk_that_stays_full_ends_the_run_in_one_line_and_with_room_it_goes_on_exactly(
    digits, finished_run, tmp_path
):
    config = tiny(digits, tmp_path / "disk", *OFTEN)
    with small_disk(tmp_path / "disk", "size=20m"):
        for schedule in (filled(tmp_path / "disk", "save:stage step=8"), None):  # the second finds it full
            with pytest.raises(RuntimeError) as error:
                run_ranks(train, 2, config, environment=schedule)
            assert "SharedError: " in str(error.value)  # a UserError that one rank says
            assert "make room" in str(error.value)
            assert steps_saved(config) == [4]
        (tmp_path / "disk" / "filler").unlink()
        assert trained(config, 2) == losses(finished_run)[:24]
        attempts = [e["step"] for e in events(config.run.path / "journal.jsonl") if e["event"] == "attempt"]
        assert attempts == [0, 4]  # the one that found no room for its line did not begin


def train_soon_done(config):
    from dtrain.tracking import tracker

    tracker.CLOSE_SECONDS = 2.0
    train(config)


@pytest.mark.campaign
def test_an_mlflow_store_on_a_full_disk_delays_its_curves_and_nothing_else(digits, tmp_path):
    from mlflow import MlflowClient

    disk = tmp_path / "disk"
    with small_disk(disk, "size=20m"):
        track = ("tracking.enabled=true", f"tracking.uri=sqlite:///{disk}/mlflow.db", "train.checkpoint_every=40")
        config = tiny(digits, tmp_path, *track)
        run_ranks(train, 2, config)
        longer = tiny(digits, tmp_path, *track, "train.steps=80")
        run_ranks(train_soon_done, 2, longer, environment=filled(disk, "step step=22"))
        assert losses(longer) == trained(tiny(digits, tmp_path / "whole", "train.steps=80"), 2)
        run = RunDirectory(longer.run.path)
        assert run.outcome()["outcome"] == "finished"
        (disk / "filler").unlink()
        assert sync(run) > 50
        client = MlflowClient(longer.tracking.uri)
        (found,) = client.search_runs([client.get_experiment_by_name("dtrain").experiment_id])
        history = client.get_metric_history(found.info.run_id, "train/loss")
        assert sorted((m.step, m.value) for m in history) == list(enumerate(losses(longer), 1))
