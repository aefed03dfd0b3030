"""From the order, the shards and the seed to batches: `dataset[step]` is everything this rank needs for that step.

Nothing here has a state to save: a batch is a pure function of (config, manifest, images seen before it), so loader
workers and ranks may come and go (design, decisions 1 and 2).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset

from dtrain.config import Config
from dtrain.data.fields.check import check_fields
from dtrain.data.fields.picture import centre_crop, normalize, random_crop
from dtrain.data.fields.samples import SampleReader, read_split
from dtrain.data.order.mixture import of_run
from dtrain.data.order.skipped import NOTHING
from dtrain.data.shards.cache import cache_of
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.reader import OPEN_SHARDS, ShardReader
from dtrain.errors import BadSample, UserError
from dtrain.randomness import Draws, Purpose

__all__ = ["Report", "StepDataset", "read_split"]

ATTEMPTS = 64  # substitutes tried before a stream counts as lost


@dataclass(frozen=True)
class Replaced:
    """A sample that could not be used, and what stands in its place; sample ids are those of the source."""

    k: int
    source: int
    sample: int
    substitute: int
    problem: str


@dataclass(frozen=True)
class Report:
    """How a batch was read: travels with it from the worker to the loop."""

    bytes_read: int = 0
    cache_hits: int = 0  # blocks of remote shards
    cache_misses: int = 0
    replaced: list[Replaced] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)  # of data workers that died: what to tell of each


class StepDataset(Dataset):
    """This rank's rows of every global batch, with all the randomness of the step.

    images: the place in the run's order where index 0 begins; skipped: the places left out. Item i is the i-th batch
    from there on, as n = batch_size / world_size rows of
        k      int64   (n,)           which image of the run
        image  float32 (n, C, H, W)   pixels in [−1, 1], flipped by chance where data.flip is set
        label  int64   (n,)           0 for an unconditional model
        time   float64 (n,)           uniform in [0, 1)
        noise  float32 (n, C, H, W)   standard normal
        drop   float64 (n,)           uniform in [0, 1), to compare with the label dropout
    and of each of data.arrays, as it is. Every number is drawn by the key (seed, purpose, k). Raises UserError for data
    that cannot be used; with data.on_error "replace" a BadSample gives way to another sample of its stream instead.
    """

    def __init__(self, config: Config, manifest: Manifest, rank: int, world_size: int, images: int, skipped=NOTHING):
        data = config.data
        if data.batch_size % world_size:
            nearest = max(1, round(data.batch_size / world_size)) * world_size
            raise UserError(
                f"data.batch_size {data.batch_size} does not divide by {world_size} ranks; "
                f"the nearest that does is {nearest}"
            )
        check_fields(config, manifest)
        self._order = of_run(config, manifest)
        self._readers, self._samples = [], []
        sources = list(zip((manifest, *manifest.mixed), (data, *data.mix), strict=True))
        for one, source in sources:
            cache = cache_of(data, source.shards)
            self._readers.append(ShardReader(one, source.shards, cache, max(1, OPEN_SHARDS // len(sources))))
            self._samples.append(
                SampleReader(self._readers[-1], data.channels, config.model.num_classes, data.arrays, data.upright)
            )
        self._draws = Draws(config.run.seed)
        self.rank, self._world_size = rank, world_size
        self._first, self._batch_size = int(skipped.ordinal(images)), data.batch_size
        self._skipped = skipped
        self._size, self._channels, self._flip, self._crop = data.image_size, data.channels, data.flip, data.crop
        self._arrays, self._replace = data.arrays, data.on_error == "replace"
        self._centre_crop = partial(centre_crop, size=self._size)
        self._replaced: list[Replaced] = []
        self._counts = np.zeros(3, dtype=np.int64)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        k, image, label, arrays = self.read(index)
        noise = np.empty(image.shape, dtype=np.float32)
        time, drop = np.empty(len(k)), np.empty(len(k))
        draws = self._draws
        for row, key in enumerate(k.tolist()):
            if self._flip and draws.uniform(Purpose.FLIP, key) < 0.5:
                image[row] = image[row].flip(-1)
            time[row] = draws.uniform(Purpose.TIME, key)
            drop[row] = draws.uniform(Purpose.LABEL_DROP, key)
            # What `draws.normal` gives, written in place.
            draws.at(Purpose.NOISE, key).standard_normal(dtype=np.float32, out=noise[row])
        numbers = {"k": k, "label": label, "time": time, "noise": noise, "drop": drop} | arrays
        return {"image": normalize(image)} | {name: torch.from_numpy(array) for name, array in numbers.items()}

    def read(self, index: int) -> tuple[np.ndarray, torch.Tensor, np.ndarray, dict[str, np.ndarray]]:
        """k (n,), the cropped pictures uint8 (n, C, H, W), labels (n,) and arrays of a batch, before any mirroring."""
        batch = self._skipped.at(self._first + index * self._batch_size, self._batch_size)
        k = self._order.deal(batch, self.rank, self._world_size)
        sources, samples = self._order.samples(k)
        for source, reader in enumerate(self._readers):
            reader.prefetch(samples[sources == source].tolist(), self._samples[source].fields)
        images = []
        label = np.zeros(len(k), dtype=np.int64)
        arrays = {n: np.empty((len(k), *a.shape), dtype=a.dtype) for n, a in self._arrays.items()}
        for row, (key, source, sample) in enumerate(zip(k.tolist(), sources.tolist(), samples.tolist(), strict=True)):
            image, label[row], own = self._read(key, source, sample)
            images.append(image)
            for name, array in own.items():
                arrays[name][row] = array
        return k, torch.stack(images), label, arrays

    def take_report(self) -> Report:
        """What was read since the last call."""
        counts = np.sum([reader.counts for reader in self._readers], axis=0)
        report = Report(*(counts - self._counts).tolist(), self._replaced)
        self._counts, self._replaced = counts, []
        return report

    def _read(self, k: int, source: int, sample: int) -> tuple[torch.Tensor, int, dict[str, np.ndarray]]:
        crop = self._crop_of(k)
        try:
            return self._samples[source].read(sample, crop)
        except BadSample as e:
            if not self._replace:
                raise
            problem = str(e)
        for attempt in range(ATTEMPTS):
            other = self._order.substitute(k, attempt)
            try:
                read = self._samples[source].read(other, crop)
            except BadSample:
                continue
            self._replaced.append(Replaced(k, source, sample, other, problem))
            return read
        raise UserError(f"{problem}; {ATTEMPTS} substitutes of its stream cannot be used either")

    def _crop_of(self, k: int) -> Callable[[torch.Tensor], torch.Tensor]:
        if self._crop == "centre":
            return self._centre_crop
        draws = [self._draws.uniform(Purpose.CROP, k, sub) for sub in range(3)]
        return partial(random_crop, size=self._size, draws=draws)
