"""Real ranks that stall or are frozen: all that run leave their stacks and exit with 76, within the limit + 10 s."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from dtrain.errors import HANG
from dtrain.run import RunDirectory
from dtrain.training.safety.watchdog import FIRST_EVALUATION, Watchdog
from tests.digits import losses, tiny
from tests.longer import longer
from tests.processes import children
from tests.ranks import run_ranks, start_ranks
from tests.small_disk import small_disk
from tests.training.runs import LONG, train, wait_for_step

LIMIT = "train.hang_limit=3"


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def assert_left_in_time(processes, config, since):
    """These processes exit with 76 soon after the limit; returns the outcome."""
    end = time.monotonic() + 90
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        assert process.exitcode == HANG
    took = time.monotonic() - since
    outcome = RunDirectory(config.run.path).outcome()
    assert outcome["outcome"] == "hang"
    limit = float(re.search(r"nothing happened for (\d+) s", outcome["message"])[1])
    assert took < limit + 10
    return outcome


def stacks(config, rank: int) -> str:
    return (config.run.path / "logs" / f"rank-{rank}.stacks").read_text()


def test_a_stalled_rank_gives_the_stacks_of_all_ranks_and_the_run_goes_on_afterwards(digits, tmp_path):
    config = tiny(digits, tmp_path, LIMIT, "data.workers=1", "train.checkpoint_every=5")
    stalled = {"DTRAIN_FAULTS": "stall at=step step=13 rank=1 attempt=1"}
    started = [process for process, _ in start_ranks(train, 2, config, environment=stalled)]
    wait_for_step(config, 11)
    since = time.monotonic()
    workers = [child for process in started for child in children(process.pid)]
    assert len(workers) >= 2
    outcome = assert_left_in_time(started, config, since)
    assert outcome["step"] in (12, 13)
    assert outcome["attempt"] == 1
    assert "faults.py" in stacks(config, 1)  # where it stalls
    assert "steps.py" in stacks(config, 0)  # where it waits for the other
    assert "rank 1 hangs after step 12" in stacks(config, 1)
    end = time.monotonic() + 30  # a worker that was starting itself looks for its parent every 5 s
    while any(map(runs, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(runs, workers))
    pids = [process.pid for process in started] + workers
    assert not [f for f in os.listdir("/dev/shm") for pid in pids if f"_{pid}_" in f]

    run_ranks(train, 2, config, environment=stalled)  # that one was for the first attempt
    assert len(losses(config)) == 20
    assert RunDirectory(config.run.path).outcome()["outcome"] == "finished"


def test_a_stall_right_after_the_first_step_is_found_by_what_that_step_took(digits, tmp_path):
    config = tiny(digits, tmp_path, LIMIT)
    stalled = {"DTRAIN_FAULTS": "stall at=step step=2 rank=1"}
    started = [process for process, _ in start_ranks(train, 2, config, environment=stalled)]
    while not RunDirectory(config.run.path).journal_file.exists():
        time.sleep(0.1)
    assert assert_left_in_time(started, config, time.monotonic())["step"] == 1
    assert "faults.py" in stacks(config, 1)
    assert "steps.py" in stacks(config, 0)


@pytest.mark.parametrize("frozen", [0, longer(1)])
def test_where_a_rank_is_frozen_the_other_leaves(digits, tmp_path, frozen):
    config = tiny(digits, tmp_path, LIMIT, *LONG)
    started = [process for process, _ in start_ranks(train, 2, config)]
    wait_for_step(config, 8)
    os.kill(started[frozen].pid, signal.SIGSTOP)
    try:
        assert_left_in_time([started[1 - frozen]], config, time.monotonic())
        assert "all_reduce" in stacks(config, 1 - frozen) or "steps.py" in stacks(config, 1 - frozen)
        assert started[frozen].is_alive()
    finally:
        started[frozen].kill()
        started[frozen].join()


def train_with_a_slow_evaluation_to_open(config):
    from dtrain.training import steps

    opened = steps.evaluation_of

    def slowly(*arguments):
        time.sleep(3)
        return opened(*arguments)

    steps.evaluation_of = slowly
    train(config)


def test_what_an_evaluation_takes_to_open_is_no_part_of_the_step_that_limits_are_learned_from(digits, tmp_path):
    config = tiny(digits, tmp_path, LIMIT, "eval.every=10")
    stalled = {"DTRAIN_FAULTS": "stall at=step step=4 rank=0"}
    started = start_ranks(train_with_a_slow_evaluation_to_open, 2, config, environment=stalled)
    for process, _ in started:
        process.join(120)
    assert started[0][0].exitcode == HANG  # the other may have seen it leave before its own limit passed
    message = RunDirectory(config.run.path).outcome()["message"]
    assert float(re.search(r"nothing happened for (\d+) s", message)[1]) < 10 * 3


def hang_in(path):
    watchdog = Watchdog(RunDirectory(path), 0, 1.0, 1800.0)
    watchdog.on_reduced([0.01])
    watchdog.beat(1)
    time.sleep(600)


def test_a_full_disk_does_not_hinder_the_end(tmp_path):
    with small_disk(tmp_path / "run", "size=64k"):
        (tmp_path / "run" / "logs").mkdir()
        with contextlib.suppress(OSError), (tmp_path / "run" / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        ((process, _),) = start_ranks(hang_in, 1, str(tmp_path / "run"))
        process.join(60)
        assert process.exitcode == HANG
        assert RunDirectory(tmp_path / "run").outcome() is None


def beating(path, seconds):
    watchdog = Watchdog(RunDirectory(path), 0, 2.0, 1800.0)
    watchdog.on_reduced([0.01])
    os.kill(os.getpid(), signal.SIGSTOP)  # until the test lets it go on
    watchdog.beat(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watchdog.beat(1)
        time.sleep(0.05)
    watchdog.close()


def test_a_job_suspended_as_a_whole_goes_on(tmp_path):
    """As `scontrol suspend` does: far longer than the limit, with every process of the job."""
    ((process, receiver),) = start_ranks(beating, 1, str(tmp_path), 3)
    time.sleep(5)
    os.kill(process.pid, signal.SIGCONT)
    assert receiver.recv() == (True, None)
    process.join(10)
    assert process.exitcode == 0
    assert not list(tmp_path.rglob("*.stacks"))


def test_limits_are_learned_from_what_all_ranks_took_and_each_says_where_it_comes_from(tmp_path):
    watchdog = Watchdog(RunDirectory(tmp_path), 0, 0, 900.0)  # watches nothing
    for phase in ("start", "step", "saving"):  # the first step compiles and connects
        assert watchdog.limit_of(phase)[0] == 900
        assert "train.start_limit" in watchdog.limit_of(phase).why
    watchdog.beat(1, 30.0)
    assert watchdog.limit_of("step") == (300, "10 times the slowest recent step")
    watchdog.on_reduced([1.0, 40.0])
    watchdog.beat(2, 50.0)
    assert watchdog.limit_of("step").seconds == 400
    for _ in range(50):
        watchdog.on_reduced([2.0, 3.0])
    assert watchdog.limit_of("step").seconds == 30
    assert watchdog.limit_of("saving").seconds == 900
    assert watchdog.limit_of("evaluation").seconds == 6 * 3600
    assert "a first evaluation" in watchdog.limit_of("evaluation").why
    with watchdog.during("evaluation"):
        time.sleep(0.01)
    assert 0.1 <= watchdog.limit_of("evaluation").seconds < 60
    assert watchdog.limit_of("evaluation").why == "10 times the slowest recent evaluation"
    patient = Watchdog(RunDirectory(tmp_path), 0, 300, 900.0)
    patient.close()
    patient.on_reduced([0.1])
    assert patient.limit_of("step") == (300, "train.hang_limit, the least of all limits")


def test_a_first_step_that_never_comes_ends_after_the_limit_that_the_config_gives_it_and_names_it(digits, tmp_path):
    config = tiny(digits, tmp_path, "train.hang_limit=1", "train.start_limit=4")
    stalled = {"DTRAIN_FAULTS": "stall at=step step=1 rank=1"}
    started = [process for process, _ in start_ranks(train, 2, config, environment=stalled)]
    while not RunDirectory(config.run.path).journal_file.exists():
        time.sleep(0.1)
    message = assert_left_in_time(started, config, time.monotonic())["message"]
    assert "hangs after step 0" in message
    assert "nothing happened for 4 s (train.start_limit, which is for the start, the first step" in message


def test_an_evaluation_that_gave_no_numbers_teaches_no_limit(tmp_path):
    watchdog = Watchdog(RunDirectory(tmp_path), 0, floor=0, start=1.0)
    with watchdog.during("evaluation") as now:
        now.whole = False  # it failed at once
    assert watchdog.limit_of("evaluation").seconds == FIRST_EVALUATION
    with watchdog.during("evaluation"):
        pass
    assert watchdog.limit_of("evaluation").seconds < 1.0
