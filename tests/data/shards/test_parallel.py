"""Worker processes that are killed from outside, as a system short of memory does."""

import multiprocessing
import os
import signal
import time

import pytest

from dtrain.data.shards.parallel import WorkerKilled, each, in_order
from tests.ranks import run_ranks, start_ranks


def itself(item):
    return item


def killed_at_7(item):
    if item == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize("way", [each, in_order])
def test_a_worker_that_is_killed_is_one_line(way):
    with pytest.raises(WorkerKilled, match="a worker process was killed"):
        list(way(killed_at_7, range(100), 2))


@pytest.mark.parametrize("way", [each, in_order])
def test_workers_killed_when_they_wait_for_work_stop_nobody(way):
    """One of them holds the lock of the queue that all of them read."""
    for _ in range(3):
        others = set(multiprocessing.active_children())
        results = way(itself, range(4), 2)
        found = [next(results) for _ in range(4)]
        assert sorted(f[1] if way is each else f for f in found) == [0, 1, 2, 3]
        time.sleep(0.2)  # both wait now
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
            break
        results.close()
        assert set(multiprocessing.active_children()) == others


def large(_: int) -> bytes:
    return bytes(64 << 20)


def leave_early(times: int) -> int:
    """Take one answer and close, while a worker is in the middle of the next."""
    for _ in range(times):
        answers = in_order(large, range(6), processes=2)
        next(answers)
        answers.close()
    return times


def test_whoever_leaves_while_a_worker_writes_half_an_answer_does_not_wait_for_the_other_half():
    assert run_ranks(leave_early, 1, 4, timeout=60) == [4]


def own_pid(_: int) -> int:
    time.sleep(0.1)  # so that each worker has one
    return os.getpid()


def killed_while_it_asks(path) -> None:
    answers = each(own_pid, range(8), 2)
    path.write_text(" ".join({str(pid) for _, pid in (next(answers) for _ in range(4))}))
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    ((process, _),) = start_ranks(killed_while_it_asks, 1, tmp_path / "workers")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = {f"/proc/{pid}" for pid in (tmp_path / "workers").read_text().split()}
    end = time.monotonic() + 20
    while left and time.monotonic() < end:
        left = {place for place in left if os.path.exists(place)}
        time.sleep(0.05)
    assert not left
