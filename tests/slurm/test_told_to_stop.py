"""On a real SLURM: a two-node job trains, is told that its time is nearly up, saves, and goes back into the queue."""

import subprocess

import pytest

from dtrain.checkpoint.directory import complete, step_of
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events
from tests.digits import tiny
from tests.slurm.cluster import submit

pytestmark = pytest.mark.slurm


def test_a_job_that_is_told_to_stop_saves_and_is_requeued(slurm, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny(digits, tmp_path / "runs", "train.steps=100000", "train.checkpoint_every=100000")
    (tmp_path / "tiny.yaml").write_text(config.dump())
    run = RunDirectory(config.run.path)
    job = submit("tiny.yaml", "--nodes", "2", "--time", "00:20:00")
    job.wait_until(lambda: any(e["event"] == "train" for e in events(run.journal_file)), "the first step")
    subprocess.run(["scancel", "--signal=USR2", "--batch", job.number], check=True)
    job.wait_for_requeue(1)
    subprocess.run(["scancel", job.number], check=True)
    assert run.outcome()["outcome"] == "stopped"
    assert [step_of(p) for p in complete(run.checkpoints)] == [run.outcome()["step"]]
    (attempt,) = [e for e in events(run.journal_file) if e["event"] == "attempt"]
    assert attempt["context"]["world_size"] == 2
    assert f"stopped in time; job {job.number} is requeued" in job.log.read_text()
