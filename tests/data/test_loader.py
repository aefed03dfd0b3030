"""Worker processes that are killed, that fail, and that have no room in /dev/shm."""

import errno
import multiprocessing
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from dtrain.data import shared_memory
from dtrain.data.loader import MOST_DEATHS, LoaderFailure, _Context, train_batches
from dtrain.data.shards.manifest import load
from dtrain.data.stream import StepDataset
from dtrain.errors import UserError
from tests.data.batches import rows_of
from tests.data.shard_files import configuration, data_set, labelled_pictures
from tests.longer import longer
from tests.processes import worker_pids
from tests.ranks import run_ranks
from tests.shared_memory import needs_root, own_shared_memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    data_set(path, labelled_pictures(57))
    return path


def opened(folder, workers=2, **data):
    return train_batches(configuration(folder, workers=workers, **data), load(folder / "manifest.json"), 0, 1, 0)


def killed(pid: int) -> None:
    """SIGKILL, and wait until it is dead."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_killed_worker_is_started_again_and_no_row_is_lost_or_comes_twice(folder):
    whole = opened(folder, workers=0)
    expected = rows_of(next(whole) for _ in range(20))
    batches, got, said = opened(folder), [], []
    for number in range(20):
        if number == 7:
            killed(worker_pids()[-1])
        got.append(next(batches))
        said += batches.report.restarts
    assert rows_of(got) == expected
    assert said == [
        "a data worker of rank 0 was killed by SIGKILL, as the system does where memory is short, and was started again"
    ]
    assert len(worker_pids()) == 2
    batches.close()
    assert worker_pids() == []


def test_a_worker_that_dies_while_its_batch_is_waited_for_is_started_again_within_seconds(
    folder, monkeypatch, tmp_path
):
    read = StepDataset.read

    def slowly(self, index):
        if index == 3 and not (tmp_path / "slept").exists():
            (tmp_path / "slept").write_text(str(os.getpid()))
            time.sleep(600)
        return read(self, index)

    monkeypatch.setattr(StepDataset, "read", slowly)
    batches = opened(folder, workers=1)
    for _ in range(3):
        next(batches)
    threading.Timer(0.5, lambda: os.kill(int((tmp_path / "slept").read_text()), signal.SIGKILL)).start()
    started = time.monotonic()
    assert next(batches)["k"].tolist() == list(range(24, 32))
    assert time.monotonic() - started < 15
    assert len(batches.report.restarts) == 1
    batches.close()


def test_workers_that_are_killed_again_and_again_are_given_up_in_one_line(folder):
    batches = opened(folder, workers=1)
    next(batches)
    for _ in range(MOST_DEATHS - 1):
        killed(worker_pids()[0])
        next(batches)
    killed(worker_pids()[0])
    with pytest.raises(
        LoaderFailure, match=r"died 3 times within 100 batches; the last one was killed by SIGKILL.*: give the job"
    ):
        next(batches)
    assert worker_pids() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_in_a_batch_and_is_no_mistake_in_the_data_is_one_line_with_its_traceback_apart(
    folder, monkeypatch, workers
):
    def broken(self, index):
        raise MemoryError("cannot allocate 8 GiB\nbut the first line is not what counts:\nout of memory")

    monkeypatch.setattr(StepDataset, "read", broken)
    batches = opened(folder, workers=workers)
    with pytest.raises(LoaderFailure) as error:
        next(batches)
    assert str(error.value) == "a batch could not be made: MemoryError: out of memory"
    assert "in broken" in error.value.details
    assert worker_pids() == []


def test_a_worker_uses_the_memory_of_its_freed_tensors_again(folder, monkeypatch):
    """Else each picture of 256 × 256 pixels costs 48 fresh pages, and a fifth of its time."""
    read, pages = StepDataset.read, 8 * 50 * 48

    def with_large_pictures(self, index):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            [torch.ones(3, 256, 256, dtype=torch.uint8) for _ in range(50)]
        k, batch = read(self, index)
        return k, batch | {"faults": torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before])}

    monkeypatch.setattr(StepDataset, "read", with_large_pictures)
    batches = opened(folder, workers=1)
    next(batches)
    faults = next(batches)["faults"].item()
    batches.close()
    assert faults < pages / 8


def test_a_process_that_cannot_be_started_is_one_line(folder, monkeypatch):
    def no_more():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_more)
    batches = opened(folder, workers=2)
    with pytest.raises(LoaderFailure, match="a data worker could not be started: Resource temporarily unavailable"):
        next(batches)
    with pytest.raises(LoaderFailure):
        next(batches)


def send_and_die(messages):
    messages.put((0, torch.zeros(5)))
    messages.close()
    messages.join_thread()  # it is in the pipe; the tensor itself is to be asked for
    os._exit(0)


def test_a_thread_that_takes_over_what_a_dead_worker_sent_leaves_without_a_traceback_and_keeps_the_reason():
    """As the one does that pins memory for a GPU."""
    context, ended = _Context(), []
    messages = context.Queue()
    worker = context.Process(target=send_and_die, args=(messages,))
    worker.start()
    worker.join()

    def take():
        try:
            messages.get(timeout=5)
        except SystemExit:  # which threads end by silently
            ended.append("silently")

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert ended == ["silently"]
    assert isinstance(messages.problem, OSError)


def held(config, manifest_path, size):
    """(bytes of /dev/shm in use once all is made ahead, bytes as they are reckoned) in a /dev/shm of this size."""
    own_shared_memory(size)

    def used() -> int:
        found = os.statvfs("/dev/shm")
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    batches = train_batches(config, load(manifest_path), 0, 1, 0)
    reckoned = shared_memory.of_ranks(1, config.data.workers, shared_memory.of_batch(config, 1))
    batch, end = next(batches), time.monotonic() + 60
    while used() < reckoned and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)  # whether more comes
    most = used()
    batches.close()
    return most, reckoned, len(batch)


@needs_root
@pytest.mark.parametrize("workers", [longer(1), 3])
def test_batches_made_ahead_take_what_is_reckoned(folder, workers):
    config = configuration(folder, 2000, workers=workers)
    ((used, reckoned, _),) = run_ranks(held, 1, config, folder / "manifest.json", "64m")
    assert reckoned == used


def overflowing(config, manifest_path, size):
    """The error of the first batches that do not fit, seconds until it came, and what is left in /dev/shm."""
    own_shared_memory(size)
    batches, started = train_batches(config, load(manifest_path), 0, 1, 0), time.monotonic()
    try:
        for _ in range(5):
            batch = next(batches)
            time.sleep(0.2)
        return None, len(batch), []
    except LoaderFailure as e:
        return str(e), time.monotonic() - started, os.listdir("/dev/shm")


@needs_root
def test_a_worker_that_finds_dev_shm_full_says_so_at_once_and_leaves_nothing_there(folder):
    config = configuration(folder, 4000, workers=2)  # batches of 0.9 MB
    ((said, seconds, left),) = run_ranks(overflowing, 1, config, folder / "manifest.json", "1m")
    assert "is full (No space left on device), so a data worker could not hand over its batch" in said
    assert all(word in said for word in ("--shm-size", "--ipc=host", "data.workers=0"))
    assert seconds < 10
    assert left == []


def closed_over_a_left_tensor(config, manifest_path):
    """What is left in /dev/shm after an orderly end of workers, one of which had begun to share a tensor."""
    own_shared_memory("64m")
    batches = train_batches(config, load(manifest_path), 0, 1, 0)
    next(batches)
    worker = multiprocessing.active_children()[0]
    Path(f"/dev/shm/torch_{worker.pid}_1_1").touch()
    batches.close()
    return os.listdir("/dev/shm")


@needs_root
def test_workers_that_end_in_order_leave_nothing_in_dev_shm(folder):
    config = configuration(folder, 8, workers=2)
    assert run_ranks(closed_over_a_left_tensor, 1, config, folder / "manifest.json") == [[]]


@needs_root
def test_what_does_not_fit_is_refused_with_what_to_do_and_what_fits_is_not(folder):
    config = configuration(folder, 8000, workers=2)
    ((said, none),) = run_ranks(checked, 1, config, "4m")
    needed = shared_memory.of_ranks(2, 2, shared_memory.of_batch(config, 2)) / 2**20
    assert f"has 4.0 MiB free, and batches made ahead take up to {needed:,.1f} MiB (5 of" in said
    assert all(word in said for word in ("--shm-size=1g", "--ipc=host", "data.workers=0"))
    assert none is None


def checked(config, size):
    own_shared_memory(size)
    try:
        shared_memory.check(config, 2, 2)
        said = None
    except UserError as e:
        said = str(e)
    without = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})
    return said, shared_memory.check(without, 2, 2)
