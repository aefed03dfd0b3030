"""From the order, the shards and the seed to batches: `dataset[step]` is everything this rank needs for that step.

Nothing here has a state to save: a batch is a pure function of (config, manifest, images seen before it), so loader
workers and ranks may come and go (design, decisions 1 and 2).
"""

import atexit
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dtrain.config import Config
from dtrain.data.manifest import Manifest
from dtrain.data.order import Order, with_streams
from dtrain.data.shards import ShardReader
from dtrain.data.transforms import centre_crop, decode, normalize
from dtrain.errors import UserError
from dtrain.randomness import Draws, Purpose

IMAGE_FIELDS = ("jpg", "jpeg", "png")
LABEL_FIELD = "cls"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StepDataset(Dataset):
    """This rank's rows of every global batch, with all the randomness of the step.

    images: images consumed before index 0. Item i is the batch that begins at image `images + i * batch_size`, as
    n = batch_size / world_size rows of
        k      int64   (n,)           which image of the run
        image  float32 (n, C, H, W)   pixels in [−1, 1], flipped by chance where data.flip is set
        label  int64   (n,)           0 for an unconditional model
        time   float64 (n,)           uniform in [0, 1)
        noise  float32 (n, C, H, W)   standard normal
        drop   float64 (n,)           uniform in [0, 1), to compare with the label dropout
    Every number is drawn by the key (seed, purpose, k). Raises UserError for data that cannot be used.
    """

    def __init__(self, config: Config, manifest: Manifest, rank: int, world_size: int, images: int):
        data = config.data
        if data.batch_size % world_size:
            nearest = max(1, round(data.batch_size / world_size)) * world_size
            raise UserError(
                f"data.batch_size {data.batch_size} does not divide by {world_size} ranks; "
                f"the nearest that does is {nearest}"
            )
        streams = with_streams(config, manifest).data.streams
        if not set(IMAGE_FIELDS) & set(manifest.fields):
            raise UserError(f"{manifest.path} has fields {', '.join(manifest.fields)}, none of them jpg, jpeg or png")
        if config.model.num_classes and LABEL_FIELD not in manifest.fields:
            raise UserError(
                f"model.num_classes is {config.model.num_classes}, but {manifest.path} has no `cls` field with labels; "
                "set it to 0 to train without"
            )
        self._order = Order(config.run.seed, manifest.shard_sizes, streams, data.shuffle_window)
        self._reader = ShardReader(manifest, data.shards)
        self._draws = Draws(config.run.seed)
        self._rank, self._world_size = rank, world_size
        self._images, self._batch_size = images, data.batch_size
        self._size, self._channels, self._flip = data.image_size, data.channels, data.flip
        self._num_classes = config.model.num_classes

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first = self._images + index * self._batch_size
        k = self._order.rows(first, self._batch_size, self._rank, self._world_size)
        image = torch.empty((len(k), self._channels, self._size, self._size), dtype=torch.uint8)
        noise = np.empty(image.shape, dtype=np.float32)
        label = np.zeros(len(k), dtype=np.int64)
        time, drop = np.empty(len(k)), np.empty(len(k))
        draws = self._draws
        for row, (key, sample) in enumerate(zip(k.tolist(), self._order.sample(k).tolist(), strict=True)):
            image[row] = _image(self._reader, sample, self._size, self._channels)
            if self._flip and draws.uniform(Purpose.FLIP, key) < 0.5:
                image[row] = image[row].flip(-1)
            if self._num_classes:
                label[row] = self._label(sample)
            time[row] = draws.uniform(Purpose.TIME, key)
            drop[row] = draws.uniform(Purpose.LABEL_DROP, key)
            noise[row] = draws.normal(Purpose.NOISE, key, noise.shape[1:])
        arrays = {"k": k, "label": label, "time": time, "noise": noise, "drop": drop}
        return {"image": normalize(image)} | {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _label(self, sample: int) -> int:
        label = _label(self._reader, sample)
        if label >= self._num_classes:
            raise UserError(
                f"{self._reader.name(sample, LABEL_FIELD)} holds the label {label}, but model.num_classes is "
                f"{self._num_classes}, so labels go from 0 to {self._num_classes - 1}"
            )
        return label


def train_batches(
    config: Config, manifest: Manifest, rank: int, world_size: int, images: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of `StepDataset` from index 0 on, without end, made ahead in `data.workers` processes.

    Closing the generator ends the workers. A UserError met in a worker is raised here, as it was.
    """
    batches = _batches(StepDataset(config, manifest, rank, world_size, images), config.data.workers)
    _close_at_exit(batches)
    return batches


def _batches(dataset: StepDataset, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    loader = DataLoader(
        _ErrorsAsData(dataset),
        batch_size=None,  # an item is a batch already
        sampler=range(sys.maxsize),
        num_workers=workers,
        worker_init_fn=_detach,
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

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | UserError:
        try:
            return self._dataset[index]
        except UserError as e:
            return e


def _detach(worker: int) -> None:
    """Leave the signals that ask for a stop to the rank: SLURM and terminals send them to every process of a job, and
    a rank that has lost its workers cannot finish its step. A worker ends when it is told to or its parent is gone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def read_split(
    manifest: Manifest, directory: str | Path, image_size: int, channels: int, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples start..stop of a split in the manifest's order: uint8 (n, C, H, W), and labels int64 (n,), 0 without."""
    reader = ShardReader(manifest, directory)
    samples = range(start, stop)
    images = torch.empty((len(samples), channels, image_size, image_size), dtype=torch.uint8)
    labels = torch.zeros(len(samples), dtype=torch.int64)
    for row, sample in enumerate(samples):
        images[row] = _image(reader, sample, image_size, channels)
        if LABEL_FIELD in manifest.fields:
            labels[row] = _label(reader, sample)
    return images, labels


def _image(reader: ShardReader, sample: int, size: int, channels: int) -> torch.Tensor:
    """The sample's picture, uint8 (channels, size, size)."""
    found = reader.read(sample, IMAGE_FIELDS)
    if not found:
        raise UserError(f"{reader.name(sample)} is of a sample without a jpg, jpeg or png; pack the shard without it")
    field, data = next(iter(found.items()))
    try:
        return centre_crop(decode(data, channels), size)
    except UserError as e:
        raise UserError(f"{reader.name(sample, field)} {e}; restore it, or pack the shard without it") from None


def _label(reader: ShardReader, sample: int) -> int:
    data = reader.read(sample, (LABEL_FIELD,)).get(LABEL_FIELD)
    if data is None:
        raise UserError(f"{reader.name(sample)} is of a sample without a `cls` label; pack the shard without it")
    if not data.strip().isdigit():
        shown = data[:20].decode("ascii", "backslashreplace")
        raise UserError(f"{reader.name(sample, LABEL_FIELD)} holds {shown!r}, not a class number; correct it")
    return int(data)
