"""The batch script against SLURM's own clock, in jobs of a minute: only the training is a stand-in, which may hang."""

from pathlib import Path

import pytest

from dtrain.cluster import slurm as jobs
from tests.cluster.stubs import Stubs
from tests.digits import tiny
from tests.slurm.cluster import Job

pytestmark = pytest.mark.slurm
TRAINING = """
mkdir -p "$RUN/checkpoints/step-0000000${SLURM_RESTART_COUNT:-0}"
say() { printf '{"outcome": "%s", "step": 1, "message": "the file stop"}' "$1" >"$RUN/outcome.json"; exit "$2"; }
case ${SLURM_RESTART_COUNT:-0} in
  0) trap "" TERM; for _ in {1..600}; do sleep 1; done ;;  # hears nothing
  1) until [[ -e $RUN/stop ]]; do sleep 0.2; done; say stopped 75 ;;
  *) say finished 0 ;;
esac
"""


def test_a_hang_over_the_end_of_the_time_and_a_stop_before_it_both_end_in_the_queue(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stubs = Stubs(tmp_path / "tools", patch)
        for name in ("srun", "scontrol", "squeue", "sinfo"):
            (stubs.bin / name).unlink()  # SLURM's own
        run = tiny(Path("digits"), tmp_path / "runs").run.path
        training = jobs.training(tmp_path / "tiny.yaml", [], run, workers=0)
        script = jobs.render(training, jobs.Request(2, 1, "00:01:00"))
    for name, value in (("RECORD", stubs.record), ("RUN", training.run), ("TRAINING", TRAINING)):
        monkeypatch.setenv(name, str(value))
    number = jobs.submit(training, script)
    job = Job(number, training.log(number))
    for requeues in (1, 2):
        job.wait_for_requeue(requeues, 60)
    assert job.exit_code() == 0, "\n".join(job.said())
    ends = [line for line in job.said() if line.startswith("dtrain: ") and "begins on" not in line]
    run = training.run
    assert ends == [
        f"dtrain: {run} broke off (it did not stop in time), but has a new checkpoint; job {number} is requeued",
        f"dtrain: {run} stopped in time; job {number} is requeued",
        f"dtrain: {run} is finished",
    ]
