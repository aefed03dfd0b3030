"""Asked to stop, a run saves at a step boundary and says so; a second job on its directory is refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime

import pytest

from dtrain.errors import UserError
from dtrain.lock import RunLock
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events
from dtrain.training.safety.stopping import StopRequest, deadline, duration
from tests.digits import losses, tiny
from tests.longer import longer
from tests.ranks import join_ranks, run_ranks, start_ranks
from tests.training.runs import LONG, train, trained, wait_for_step


def ask(how, config, started):
    if how == "stop file":
        (config.run.path / "stop").touch()
    else:
        os.kill(started[1][0].pid, getattr(signal, how))  # one rank is enough, and it need not be rank 0


@pytest.mark.parametrize("how", ["SIGTERM", longer("SIGUSR2"), "stop file"])
def test_a_stop_ends_in_a_checkpoint_at_a_step_boundary_and_the_run_goes_on_exactly(digits, tmp_path, how):
    config = tiny(digits, tmp_path, *LONG)
    started = start_ranks(train, 2, config)
    wait_for_step(config, 12)
    ask(how, config, started)
    assert join_ranks(started) == ["stopped", "stopped"]
    run = RunDirectory(config.run.path)
    outcome = run.outcome()
    assert outcome["outcome"] == "stopped"
    stopped_at = outcome["step"]
    assert stopped_at >= 12
    checkpoints = [e["step"] for e in events(run.journal_file) if e["event"] == "checkpoint"]
    assert checkpoints == [stopped_at]
    assert len(losses(config)) == stopped_at  # not one step is missing from the journal, or beyond the checkpoint
    assert not run.lock_file.exists()
    steps = f"train.steps={stopped_at + 10}"
    again = trained(tiny(digits, tmp_path, steps), 2)  # the stop file was removed at start
    assert again == trained(tiny(digits, tmp_path / "whole", steps), 2)


def test_a_deadline_stops_the_run_before_it_passes(digits, tmp_path):
    config = tiny(digits, tmp_path, *LONG, "train.deadline=00:00:14")
    started = time.time()
    assert run_ranks(train, 2, config) == ["stopped", "stopped"]
    assert time.time() - started < 14
    assert RunDirectory(config.run.path).outcome()["outcome"] == "stopped"


def test_deadlines_come_from_the_config_the_environment_or_slurm(tmp_path, monkeypatch, capsys):
    for name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert deadline(None, 0) is None
    assert duration("11:45:00") == 42300
    assert deadline("1-00:00:10", started=1000.0) == 1000 + 86410
    assert deadline("2030-01-02T03:04:05+00:00", 0) == 1893553445
    with pytest.raises(UserError, match=r"train.deadline 'soon' is neither a duration"):
        deadline("soon", 0)
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$*" = "-h -j 77 -o %e" ] && echo 2030-01-02T03:04:05\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert deadline(None, 0) == datetime(2030, 1, 2, 3, 4, 5).timestamp()
    squeue.write_text("#!/bin/sh\necho NONE\n")
    assert deadline(None, 0) is None
    assert capsys.readouterr().out == ""
    squeue.write_text("#!/bin/sh\necho the controller is away >&2; exit 1\n")
    assert deadline(None, 0) is None
    assert "squeue did not answer: the controller is away" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1234")
    assert deadline(None, 0) == 1234
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    with pytest.raises(UserError, match="SLURM_JOB_END_TIME is 'soon', not a time"):
        deadline(None, 0)


def test_a_task_of_a_job_array_asks_for_its_own_deadline_and_says_an_answer_that_is_none(tmp_path, monkeypatch, capsys):
    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/sh\ncase $3 in 77_2) echo 2030-01-02T03:04:05;; *) echo 2030-01-02T03:04:05; echo N/A;; esac\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert deadline(None, 0) is None
    assert "of job 77 squeue answered '2030-01-02T03:04:05 N/A', which is no time" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert deadline(None, 0) == datetime(2030, 1, 2, 3, 4, 5).timestamp()


def test_the_margin_before_a_deadline_grows_with_measured_saves_and_steps():
    ends = time.time() + 100
    assert not StopRequest(None, ends).wanted(seconds_per_step=1, seconds_per_save=30)
    assert StopRequest(None, ends).wanted(seconds_per_step=1, seconds_per_save=45)
    assert StopRequest(None, ends).wanted(seconds_per_step=31, seconds_per_save=1)


def test_a_second_job_is_refused_and_changes_nothing(digits, tmp_path):
    config = tiny(digits, tmp_path, *LONG)
    started = start_ranks(train, 1, config)
    wait_for_step(config, 3)
    before = (config.run.path / "config.yaml").read_text()
    with pytest.raises(RuntimeError, match=r"tiny is in use by process \d+ on .*; wait for it, stop it with `touch"):
        run_ranks(train, 1, tiny(digits, tmp_path, "train.steps=7"))
    assert (config.run.path / "config.yaml").read_text() == before
    (config.run.path / "stop").touch()
    assert join_ranks(started) == ["stopped"]


def hold(path):
    from pathlib import Path

    RunLock(Path(path)).acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_of_a_dead_process_is_taken_over_and_one_of_a_living_is_not(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(RuntimeError, match="rank 0 died"):
        run_ranks(hold, 1, str(path))
    assert path.exists()
    lock = RunLock(path)
    lock.acquire()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        RunLock(path).acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_given_again_does_not_keep_a_lock_alive(tmp_path):
    path = tmp_path / "lock"
    RunLock(path).acquire()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "1"}))
    RunLock(path).acquire()


def test_a_container_does_not_take_the_lock_of_a_process_that_it_cannot_see(tmp_path):
    path = tmp_path / "lock"
    lock = RunLock(path)
    lock.acquire()
    code = f"from dtrain.lock import RunLock; from pathlib import Path; RunLock(Path({str(path)!r})).acquire()"
    contained = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    if subprocess.run([*contained[:4], "true"], capture_output=True).returncode:
        pytest.skip("a name space for processes takes root")
    refused = subprocess.run(contained, capture_output=True, text=True)
    assert f"is in use by process {os.getpid()}" in refused.stderr
    os.utime(path, (time.time() - 400, time.time() - 400))
    subprocess.run(contained, check=True)
    assert json.loads(path.read_text())["pid"] != os.getpid()
    lock.release()
    assert path.exists()  # it is the other's


@pytest.mark.parametrize("text", ["", "{}", "[1]", "no JSON"])
def test_a_lock_that_does_not_tell_its_holder_is_one_line(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(UserError, match="lock does not tell who holds it; remove it if no job uses this run"):
        RunLock(tmp_path / "lock").acquire()


def test_another_machines_lock_lives_by_its_heartbeat(tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "boot": "other", "pid": 1, "started": "5", "job": "42"}))
    with pytest.raises(UserError, match="in use by process 1 on elsewhere, job 42"):
        RunLock(path).acquire()
    os.utime(path, (time.time() - 400, time.time() - 400))
    RunLock(path).acquire()
    assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_a_requeued_job_takes_over_its_own_lock_from_a_machine_that_is_gone(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    holder = {"host": "elsewhere", "boot": "other", "pid": 1, "started": "5", "job": "42", "restarts": None}
    path.write_text(json.dumps(holder))
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with pytest.raises(UserError, match="in use by process 1 on elsewhere, job 42"):
        RunLock(path).acquire()  # the same start of the job, on another machine
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(path).acquire()
    assert json.loads(path.read_text())["host"] == socket.gethostname()


def take(path):
    from pathlib import Path

    lock = RunLock(Path(path))
    try:
        lock.acquire()
    except UserError:
        return False
    time.sleep(3)
    return True


@pytest.mark.campaign
def test_of_several_that_find_a_dead_lock_one_gets_it(tmp_path):
    path = tmp_path / "lock"
    for _ in range(3):
        path.write_text(json.dumps({"host": socket.gethostname(), "boot": "before", "pid": 1, "started": "5"}))
        assert sorted(run_ranks(take, 4, str(path))) == [False, False, False, True]
        path.unlink()
