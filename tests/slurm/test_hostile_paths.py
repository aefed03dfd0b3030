"""SLURM itself finds the log of a run with a hostile name, and its job runs nothing but what was meant."""

import os
from pathlib import Path

import pytest

from dtrain.cluster import slurm as jobs
from tests.cluster.hostile import HOSTILE, rendered
from tests.cluster.stubs import Stubs
from tests.slurm.cluster import Job

pytestmark = pytest.mark.slurm


def test_the_log_is_where_it_was_said_to_be_whatever_the_name(slurm, tmp_path, monkeypatch):
    path, submitted = os.environ["PATH"], []
    for number, name in enumerate(HOSTILE):
        work = tmp_path / str(number) / f"work {name}"
        work.mkdir(parents=True)
        monkeypatch.chdir(work)
        stubs = Stubs(work.parent / "tools", monkeypatch)
        (stubs.bin / "sinfo").write_text("#!/bin/bash\n")  # no GPUs
        script, job, _ = rendered(work, name, jobs.Request(1, 1, "00:05:00"))
        monkeypatch.setenv("PATH", path)
        monkeypatch.setenv("RECORD", str(stubs.record))
        monkeypatch.setenv("RUN", str(job.run))
        monkeypatch.setenv("TRAINING", """echo trained; echo '{"outcome": "finished"}' >"$RUN/outcome.json" """)
        kept = jobs.submit(job, script)
        submitted.append((job, Job(kept, job.log(kept))))
    for job, run in submitted:
        assert run.exit_code() == 0, run.said()
        assert run.said()[-2:] == ["trained", f"dtrain: {job.run} is finished"]
        assert Path(job.log(run.number)).with_suffix(".sbatch").exists()
    assert list(tmp_path.rglob("pwned")) == []
