"""Batches made ahead by worker processes that never outlive their rank, and are started again where they are killed."""

import atexit
import multiprocessing
import multiprocessing.context
import multiprocessing.queues
import multiprocessing.util
import os
import queue
import signal
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import connection
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from dtrain import distributed
from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.data import shared_memory
from dtrain.data.order.skipped import NOTHING
from dtrain.data.shards.manifest import Manifest
from dtrain.data.stream import Report, StepDataset
from dtrain.errors import UserError
from dtrain.terminal import printable

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
MOST_DEATHS = 3  # of workers within RECENT batches: then something keeps killing them
RECENT = 100
DEATH_SECONDS = 1.0  # till a worker whose messages cannot be read any more is seen to be dead
JOIN_SECONDS = 5.0  # for a killed one to be gone: a read from a disk that hangs keeps it
OFTEN = {  # what workers that were not killed by a person die of
    signal.SIGKILL: ", as the system does where memory is short",
    signal.SIGBUS: ", as where /dev/shm is full or a file that is being read was cut off",
}

Made = tuple[Batch, Report]


class LoaderFailure(RuntimeError):
    """What keeps batches from coming and is no mistake in the data, such as workers that are killed for want of memory.

    One line. details: a traceback, where there is one.
    """

    def __init__(self, message: str, details: str = ""):
        super().__init__(printable(message))
        self.details = details


class Batches(Iterator[Batch]):
    """Batches 0, 1, 2, … of a StepDataset without end, made ahead in `workers` processes.

    report: how the batch given last was read. `close` ends the workers. A UserError met in a worker is raised here, as
    it was; any other failure of one is a LoaderFailure. As a batch is a pure function of its number, workers that were
    killed are started again where they were, but for those that something keeps killing.
    """

    def __init__(self, dataset: StepDataset, workers: int):
        self.report = Report()
        self._dataset, self._number, self._rank = dataset, workers, dataset.rank
        self._given = 0  # batches
        self._deaths: deque[int] = deque(maxlen=MOST_DEATHS)  # how many batches had been given before each
        self._restarts: list[str] = []  # what the next report says of them
        self._failure: LoaderFailure | None = None
        self._workers: _Workers | None = None
        self._start()
        _close_at_exit(self)

    def __next__(self) -> Batch:
        made = self._next()
        if isinstance(made, UserError | LoaderFailure):
            self.close()
            raise made
        self._given += 1
        batch, self.report = made
        if self._restarts:
            self.report, self._restarts = replace(self.report, restarts=self._restarts), []
        return batch

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _start(self) -> None:
        try:
            self._workers = _Workers(self._dataset, self._number, self._given)
        except (OSError, RuntimeError) as e:  # said where the first batch is asked for, as other failures are
            self._failure = LoaderFailure(f"a data worker could not be started: {getattr(e, 'strerror', None) or e}")

    def _next(self) -> Made | UserError | LoaderFailure:
        while self._failure is None:
            if self._workers is None:
                raise StopIteration
            try:
                return next(self._workers)
            except _WorkerDied as e:
                self._workers.kill()
                self._workers = None
                self._start_again(str(e))
            except LoaderFailure as e:
                return e
        return self._failure

    def _start_again(self, how: str) -> None:
        self._deaths.append(self._given)
        if len(self._deaths) == MOST_DEATHS and self._given - self._deaths[0] < RECENT:
            self._failure = LoaderFailure(
                f"data workers of rank {self._rank} died {MOST_DEATHS} times within {RECENT} batches; the last one "
                f"{how}: give the job more memory, or take fewer data.workers"
            )
            return
        self._restarts.append(f"a data worker of rank {self._rank} {how}, and was started again")
        self._start()


def train_batches(config: Config, manifest: Manifest, rank: int, world_size: int, images: int, skipped=NOTHING):
    """The `Batches` of `StepDataset` from index 0 on, made ahead in `shared_memory.loader_processes`."""
    workers = shared_memory.loader_processes(config, world_size, distributed.local_world_size())
    return Batches(StepDataset(config, manifest, rank, world_size, images, skipped), workers)


class _WorkerDied(Exception):
    """Says how: `was killed by SIGKILL`, …"""


class _Workers:
    """Processes that make batches `first`, `first` + 1, … ahead, by torch's DataLoader; none where `number` is 0."""

    def __init__(self, dataset: StepDataset, number: int, first: int):
        """Raises OSError where the system starts no process, RuntimeError where it starts no thread."""
        loader = DataLoader(
            _ErrorsAsData(dataset),
            batch_size=None,  # an item is a batch already
            sampler=range(first, sys.maxsize),
            num_workers=number,
            prefetch_factor=shared_memory.PREFETCH if number else None,
            worker_init_fn=partial(_detach, owner=os.getpid()),
            multiprocessing_context=_Context() if number else None,
            pin_memory=torch.cuda.is_available(),
        )
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # till `_detach` has run, in the workers
        before = set(multiprocessing.active_children())
        try:
            self._iterator = iter(loader)
        except (OSError, RuntimeError):
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()  # torch would ask them to end, and wait: they do not listen
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._processes: list[BaseProcess] = self._iterator._workers if number else []
        if number:
            # Else torch raises out of a signal handler, wherever this rank is when a worker dies: in a collective.
            signal_handling._remove_worker_pids(id(self._iterator))
            self._iterator._worker_pids_set = False

    def __next__(self) -> Made | UserError | LoaderFailure:
        """Raises _WorkerDied, or LoaderFailure where a batch cannot be taken over from a worker."""
        self._raise_if_dead(0.0)  # torch looks after waiting for 5 s
        try:
            return next(self._iterator)
        except Exception as e:
            self._raise_if_dead(DEATH_SECONDS)
            problem = e
            if self._processes and self._iterator._worker_result_queue.problem is not None:
                problem = self._iterator._worker_result_queue.problem
            raise _failure(problem, "a batch could not be taken over from a data worker") from None

    def close(self) -> None:
        """In order, and at once: a traceback on its way up may keep torch's iterator alive."""
        if not all(worker.is_alive() for worker in self._processes):
            self.kill()
        elif self._processes:
            self._iterator._shutdown_workers()
            self._end_processes()

    def kill(self) -> None:
        """After a death: torch's own way may wait for a lock that the dead one has taken with it."""
        self._end_processes()
        self._iterator._shutdown = True
        if hasattr(self._iterator, "_pin_memory_thread"):
            self._iterator._pin_memory_thread_done_event.set()
        for one in (self._iterator._worker_result_queue, *self._iterator._index_queues):
            one.cancel_join_thread()
            one.close()

    def _end_processes(self) -> None:
        for worker in self._processes:
            worker.kill()
        for worker in self._processes:
            worker.join(JOIN_SECONDS)
            shared_memory.remove_left(worker.pid)  # one may have ended while its thread was sharing a tensor

    def _raise_if_dead(self, seconds: float) -> None:
        """Raises _WorkerDied as soon as one is, within `seconds`."""
        dead = connection.wait([worker.sentinel for worker in self._processes], seconds) if self._processes else []
        for worker in self._processes:
            if worker.sentinel in dead:
                worker.join()
                raise _WorkerDied(_ending(worker.exitcode))


def _ending(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    number = -exitcode
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"was killed by {name}{OFTEN.get(number, '')}"


def _close_at_exit(batches: Batches) -> None:
    """End the workers of batches that are still open when this process exits.

    multiprocessing sends SIGTERM to children that are left and waits for them: for ever, as they ignore it (`_detach`).
    """
    owner, alive = os.getpid(), weakref.ref(batches)

    def close():
        left = alive()
        if left is not None and os.getpid() == owner:
            left.close()

    atexit.register(close)  # runs before torch's own, which makes `_shutdown_workers` do nothing
    multiprocessing.util.Finalize(None, close, exitpriority=100)  # processes of multiprocessing leave atexit out


class _ErrorsAsData(Dataset):
    """DataLoader makes a worker's exception into one whose message is a traceback; as data it comes through whole."""

    def __init__(self, dataset: StepDataset):
        self._dataset = dataset

    def __getitem__(self, index: int) -> Made | UserError | LoaderFailure:
        try:
            return self._dataset[index], self._dataset.take_report()
        except UserError as e:
            return e
        except Exception as e:
            return _failure(e, "a batch could not be made")


def _failure(error: Exception, what: str) -> LoaderFailure:
    """The last line of the error: torch's hold a traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    said = f"{what}: {type(error).__name__}{': ' if lines else ''}{lines[-1].strip() if lines else ''}"
    return LoaderFailure(said, "".join(traceback.format_exception(error)))


class _Context(multiprocessing.context.ForkContext):
    def Queue(self, maxsize: int = 0):
        return _Queue(maxsize, ctx=self.get_context())


class _Queue(multiprocessing.queues.Queue):
    """multiprocessing loses what its feeder thread cannot send, and whoever waits for it waits for ever. Here the
    reason is sent in its place.

    problem: why the thread that pins memory, which has left for it, could not read a message.
    """

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.problem: Exception | None = None
        self._maker = threading.current_thread()

    def _on_queue_feeder_error(self, error: Exception, item) -> None:
        if os.getpid() == self._opid:  # the rank's own, which sends numbers
            super()._on_queue_feeder_error(error, item)
            return
        if not isinstance(item, tuple):  # bytes: the rank has gone
            os._exit(1)
        shared_memory.remove_left(os.getpid())
        if "No space left on device" in str(error):
            reason = LoaderFailure(shared_memory.full("No space left on device"))
        else:
            reason = _failure(error, "a data worker could not hand over its batch")
        self.put((item[0], reason))

    def get(self, *arguments, **more):
        try:
            return super().get(*arguments, **more)
        except queue.Empty:
            raise
        except Exception as e:
            if threading.current_thread() is self._maker:
                raise
            self.problem = e
            raise SystemExit from None  # ends a thread without a traceback on the terminal


def _detach(worker: int, owner: int) -> None:
    """Leave the signals that ask for a stop to the rank: SLURM and terminals send them to every process of a job, and
    a rank that has lost its workers cannot finish its step. A worker ends when it is asked to or its parent is gone.
    """
    if os.getppid() != owner:
        os._exit(1)  # torch's own watch begins after this and would take whoever adopted this process for its rank
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    distributed.keep_freed_memory()  # a worker's tensors are of the processor, whatever its rank computes on
