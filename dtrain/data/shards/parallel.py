"""The same work for many shards in several processes, each result as soon as it is there."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from dtrain import addresses
from dtrain.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

KILLED = "a worker process was killed; see that memory suffices and start again"


class WorkerKilled(UserError):
    """A worker process was killed from outside, as the system does where memory is short."""


def cores() -> int:
    return len(os.sched_getaffinity(0))


def each(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int | None = None
) -> Iterator[tuple[int, Result]]:
    """(place, function(item)) of every item in the order they are done; an exception ends it and is raised here.

    processes: default one a core. Few items are in flight at a time, so memory does not grow with their number.
    """
    processes = min(processes or cores(), len(items))
    if processes <= 1:
        yield from ((place, function(item)) for place, item in enumerate(items))
        return
    todo: Iterable = iter(enumerate(items))
    pool = _pool(processes)
    try:
        running = {}
        while True:
            for place, item in todo:
                running[_submit(pool, function, item)] = place
                if len(running) >= 2 * processes:
                    break
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), _result(done)
    finally:
        _end(pool)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int | None = None
) -> Iterator[Result]:
    """function(item) of every item, in their order, a few ahead of what is taken; as `each` does otherwise."""
    processes = processes or cores()
    if processes == 1:
        yield from map(function, items)
        return
    pool = _pool(processes)
    running: deque = deque()
    try:
        for item in items:
            running.append(_submit(pool, function, item))
            if len(running) > 2 * processes:
                yield _result(running.popleft())
        while running:
            yield _result(running.popleft())
    finally:
        _end(pool)


def _pool(processes: int) -> ProcessPoolExecutor:
    """Spawned, not forked: the caller may have threads, of a progress bar or of fsspec. They can open what it can."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, spawn, initializer=_begin, initargs=(addresses.environment(),))


def _begin(environment: dict[str, str]) -> None:
    """In a worker, before its first item."""
    os.environ.update(environment)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Where the process that asked is killed, no queue ends: each worker holds the other end of those it waits at."""
    connection.wait([parent])
    os._exit(1)


def _end(pool: ProcessPoolExecutor) -> None:
    """Kill the workers: what is still asked of them is wanted no more.

    They are not asked to leave, since one that was killed while it waited for work has taken the queue's lock with it,
    and whoever waits for the others would wait for ever. One may be killed in the middle of an answer: the pool's
    thread would wait for the rest of it as long as this process holds the pipe's other end too.
    """
    processes, answers = list((pool._processes or {}).values()), pool._result_queue
    for process in processes:
        process.kill()
    for process in processes:
        connection.wait([process.sentinel])
    if answers is not None:
        answers._writer.close()
    pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, function: Callable[[Item], Result], item: Item) -> Future:
    # A worker that is started by this never sees a terminal's Ctrl-C, of which it would show a traceback: who asked for
    # the work ends it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, item)
    except BrokenProcessPool:
        raise WorkerKilled(KILLED) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _result(future: Future) -> Result:
    try:
        return future.result()
    except BrokenProcessPool:
        raise WorkerKilled(KILLED) from None
