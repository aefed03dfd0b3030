"""What the batch script does when an attempt has ended, by the way it ended; bash itself runs it, with stand-ins."""

import os
import signal
import time
from pathlib import Path

import pytest

from dtrain.cluster import slurm
from tests.cluster.stubs import RECORD, Stubs
from tests.digits import tiny

CHECKPOINT = 'mkdir -p "$RUN/checkpoints/step-$(date +%s%N)"; '


def outcome(name: str, message: str = "") -> str:
    extra = f', "message": "{message}"' if message else ""
    return f"""echo '{{"outcome": "{name}", "step": 1, "attempt": 1{extra}}}' >"$RUN/outcome.json"; """


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny(Path("digits"), tmp_path / "runs")
    return slurm.training(tmp_path / "tiny.yaml", [], config.run.path, config.data.workers)


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    return Stubs(tmp_path / "tools", monkeypatch)


@pytest.fixture
def attempt(job, stubs):
    """Run the script once: (exit code, whether it was requeued, the last line of its log)."""
    script = slurm.render(job, slurm.Request(2, 1, "1:00:00"))

    def run(**environment: str):
        log = job.log("7")
        code = stubs.run(script, job.run, log, **environment)
        requeued = ["requeue", "7"] in stubs.calls("scontrol")
        for call in stubs.record.glob("scontrol.*"):
            call.unlink()
        return -9 if requeued else code, requeued, log.read_text().splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("training", "code", "line"),
    [
        (CHECKPOINT + outcome("finished") + "exit 0", 0, "is finished"),
        (CHECKPOINT + outcome("stopped", "SIGTERM") + "exit 75", "requeued", "stopped in time; job 7 is requeued"),
        (CHECKPOINT + outcome("stopped", "the deadline") + "exit 143", "requeued", "job 7 is requeued"),
        (outcome("stopped", "the deadline") + "exit 75", 75, "made no step in the time of this job; give it more"),
        (CHECKPOINT + outcome("stopped", "the file x/stop") + "exit 75", 75, "was stopped by a person"),
        (CHECKPOINT + outcome("user_error", "disk") + "echo dtrain: too full; echo x; exit 2", 2, "dtrain: too full"),
        ("echo dtrain: no such thing; echo launcher chatter; exit 2", 2, "dtrain: no such thing"),
        (CHECKPOINT + outcome("crashed", "killed") + "exit 1", "requeued", "broke off (exit code 1), but has a new"),
        (CHECKPOINT + outcome("hang") + "exit 76", "requeued", "broke off (exit code 76), but has a new checkpoint"),
        (CHECKPOINT + "kill -9 $$", "requeued", "broke off (exit code 137), but has a new checkpoint"),
        (CHECKPOINT + "exit 0", "requeued", "broke off (exit code 0), but has a new checkpoint"),
        ("exit 1", 1, "broke off (exit code 1) before a new checkpoint: not again"),
    ],
)
def test_an_attempt_is_repeated_where_that_helps(attempt, training, code, line):
    ended, requeued, last = attempt(TRAINING=training)
    assert (ended == code, requeued) == (True, False) or (code, requeued) == ("requeued", True)
    assert line in last


def test_an_outcome_that_an_earlier_attempt_left_does_not_count(attempt, job):
    (job.run / "logs").mkdir(parents=True)
    (job.run / "outcome.json").write_text('{"outcome": "finished", "step": 1}')
    assert attempt(TRAINING="exit 1")[0] == 1


def test_a_damaged_checkpoint_of_a_later_step_hides_no_progress(attempt, job):
    (job.run / "checkpoints" / "step-9999999999999999999").mkdir(parents=True)
    assert attempt(TRAINING=CHECKPOINT + outcome("stopped", "SIGTERM") + "exit 75")[1]
    assert not attempt(TRAINING=outcome("stopped", "SIGTERM") + "exit 75")[1]


def test_what_the_check_refuses_is_the_last_line_and_nothing_is_launched(attempt, stubs):
    ended, requeued, last = attempt(CHECK="echo dtrain: the shard is gone; exit 2")
    assert (ended, requeued, last) == (2, False, "dtrain: the shard is gone")
    assert stubs.calls("deepspeed") == []


def test_a_reason_of_an_earlier_attempt_is_not_given_again(attempt, job):
    job.log("7").parent.mkdir(parents=True)
    job.log("7").write_text("dtrain: an old reason\n")
    assert attempt(CHECK="echo dtrain: a new reason; echo more; exit 2")[2] == "dtrain: a new reason"


def test_three_failures_in_a_row_are_the_end_and_a_stop_between_them_begins_anew(attempt):
    crash, stop = CHECKPOINT + "exit 1", CHECKPOINT + outcome("stopped", "SIGTERM") + "exit 75"
    assert [attempt(TRAINING=t)[1] for t in (crash, crash, stop, crash, crash)] == [True] * 5
    code, requeued, last = attempt(TRAINING=crash)
    assert (code, requeued) == (1, False)
    assert last.endswith("broke off 3 times in a row: not again")


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_signal_before_the_end_becomes_a_stop_file_that_outlives_the_start_of_the_run(job, stubs):
    script = slurm.render(job, slurm.Request(2, 1, "1:00:00"))
    training = 'touch "$RUN/up"; until [[ -e $RUN/stop ]]; do sleep 0.1; done; rm "$RUN/stop"; '  # removed as stale
    training += (
        "until [[ -e $RUN/stop ]]; do sleep 0.1; done; " + CHECKPOINT + outcome("stopped", "the file") + "exit 75"
    )
    process = stubs.start(script, job.run, job.log("7"), TRAINING=training)
    wait_for((job.run / "up").exists)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(20) == -9
    assert ["requeue", "7"] in stubs.calls("scontrol")
    assert not (job.run / "stop").exists()


def test_slurm_that_ends_the_script_before_it_answers_scontrol_has_requeued_all_the_same(job, stubs):
    requeue = RECORD + "[[ $1 == requeue ]] || exit 0\nkill -TERM $PPID $$\nsleep 0.5\n"
    (stubs.bin / "scontrol").write_text(requeue)
    script = slurm.render(job, slurm.Request(2, 1, "1:00:00"))
    process = stubs.start(script, job.run, job.log("7"), TRAINING=CHECKPOINT + outcome("stopped") + "exit 75")
    process.wait(30)  # and not only when its sleep is over
    assert stubs.calls("scontrol")[-1] == ["requeue", "7"]
    assert job.log("7").read_text().splitlines()[-1].endswith("stopped in time; job 7 is requeued")


def test_a_requeue_that_slurm_refuses_is_the_last_line(job, stubs):
    (stubs.bin / "scontrol").write_text(RECORD + "[[ $1 != requeue ]]\n")
    script = slurm.render(job, slurm.Request(2, 1, "1:00:00"))
    code = stubs.run(script, job.run, job.log("7"), TRAINING=CHECKPOINT + outcome("stopped") + "exit 75")
    assert code == 75
    assert job.log("7").read_text().splitlines()[-1] == "dtrain: job 7 could not be requeued; submit it again"


def test_a_cancelled_job_is_not_requeued(job, stubs):
    script = slurm.render(job, slurm.Request(2, 1, "1:00:00"))
    training = 'touch "$RUN/up"; sleep 1; ' + CHECKPOINT + outcome("stopped", "SIGTERM") + "exit 75"
    process = stubs.start(script, job.run, job.log("7"), TRAINING=training)
    wait_for((job.run / "up").exists)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 143
    assert ["requeue", "7"] not in stubs.calls("scontrol")


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, ""])
def test_a_training_that_hangs_when_its_time_is_over_is_given_up_before_slurm_kills_the_script(job, stubs, checkpoint):
    (stubs.bin / "squeue").write_text("#!/bin/bash\necho 2021-01-02T03:04:05\n")
    script = slurm.render(job, slurm.Request(2, 1, "1:00:00")).replace("sleep 10;", "sleep 1;")
    training = (
        'trap "" TERM; ' + checkpoint + 'touch "$RUN/up"; for _ in {1..60}; do [[ -e $RUN/over ]] || sleep 1; done'
    )
    process = stubs.start(script, job.run, job.log("7"), TRAINING=training)
    wait_for((job.run / "up").exists)
    os.kill(process.pid, signal.SIGTERM)
    code, last = process.wait(60), job.log("7").read_text().splitlines()[-1]
    assert (code, ["requeue", "7"] in stubs.calls("scontrol")) == ((-9, True) if checkpoint else (1, False))
    assert "broke off (it did not stop in time)" in last
    (job.run / "over").touch()


def test_the_training_gets_the_jobs_end_its_cores_and_the_first_nodes_address(attempt, stubs, job):
    attempt(TRAINING='printenv SLURM_JOB_END_TIME SRUN_CPUS_PER_TASK >"$RUN/seen"; ' + outcome("finished"))
    end, cores = (job.run / "seen").read_text().split()
    assert time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(int(end))) == "2031-01-02T03:04:05"
    assert cores == "2"
    (launched,) = stubs.calls("deepspeed")
    assert launched[launched.index("--master_addr") + 1] == "10.0.0.7"
    assert launched[launched.index("--master_port") + 1] == "12007"


def test_a_task_of_a_job_array_asks_for_its_own_time_and_requeues_itself_alone(job, stubs):
    log = job.log("7")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    training = CHECKPOINT + outcome("stopped", "the deadline") + "exit 75"
    script = slurm.render(job, slurm.Request(2, 1, "1:00:00"))
    stubs.run(script, job.run, log, TRAINING=training, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    assert "--jobs=5_3" in stubs.calls("squeue")[0]
    assert ["requeue", "5_3"] in stubs.calls("scontrol")
