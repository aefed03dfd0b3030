"""Batches made ahead by worker processes that never outlive their rank."""

import atexit
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from dtrain.data.stream import Report, StepDataset
from dtrain.errors import UserError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Batches(Iterator[dict[str, torch.Tensor]]):
    """Batches 0, 1, 2, … of a StepDataset without end, made ahead in `workers` processes.

    report: how the batch given last was read. `close` ends the workers. A UserError met in a worker is raised here, as
    it was.
    """

    def __init__(self, dataset: StepDataset, workers: int):
        self.report = Report()
        self._batches = _batches(dataset, workers)
        _close_at_exit(self._batches)

    def __next__(self) -> dict[str, torch.Tensor]:
        batch, self.report = next(self._batches)
        return batch

    def close(self) -> None:
        self._batches.close()


def _batches(dataset: StepDataset, workers: int) -> Iterator[tuple[dict[str, torch.Tensor], Report]]:
    loader = DataLoader(
        _ErrorsAsData(dataset),
        batch_size=None,  # an item is a batch already
        sampler=range(sys.maxsize),
        num_workers=workers,
        worker_init_fn=partial(_detach, owner=os.getpid()),
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    before = set(multiprocessing.active_children())
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # till `_detach` has run, in the workers
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    started = set(multiprocessing.active_children()) - before
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        if workers:
            # What the iterator's deletion does, but now: a traceback on its way up may keep the iterator alive.
            batches._shutdown_workers()
        for worker in started:
            if worker.is_alive():
                worker.kill()


def _close_at_exit(batches: Iterator) -> None:
    """End the workers of a generator that is still open when this process exits.

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

    def __getitem__(self, index: int) -> tuple[dict[str, torch.Tensor], Report] | UserError:
        try:
            return self._dataset[index], self._dataset.take_report()
        except UserError as e:
            return e


def _detach(worker: int, owner: int) -> None:
    """Leave the signals that ask for a stop to the rank: SLURM and terminals send them to every process of a job, and
    a rank that has lost its workers cannot finish its step. A worker ends when it is told to or its parent is gone.
    """
    if os.getppid() != owner:
        os._exit(1)  # torch's own watch begins after this and would take whoever adopted this process for its rank
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
