"""From the order, the shards and the seed to batches: `dataset[step]` is everything this rank needs for that step.

A batch travels small, from a worker through /dev/shm to its device; `Completion` makes the whole of it there.

Nothing here has a state to save: a batch is a pure function of (config, manifest, images seen before it), so loader
workers and ranks may come and go (design, decisions 1 and 2).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset

from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.data.declared import Declared, declared
from dtrain.data.fields.caption import Caption
from dtrain.data.fields.check import check_fields
from dtrain.data.fields.embedded import TokenCounts
from dtrain.data.fields.field import View
from dtrain.data.fields.picture import Crop
from dtrain.data.fields.samples import SampleReader, read_split
from dtrain.data.order.mixture import of_run
from dtrain.data.order.skipped import NOTHING
from dtrain.data.shards.cache import cache_of
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.reader import OPEN_SHARDS, ShardReader
from dtrain.device_draws import normals_on
from dtrain.errors import BadSample, UserError
from dtrain.randomness import Draws, Purpose, drawn

__all__ = ["Report", "StepDataset", "read_split"]

SUBSTITUTES = 64  # substitutes tried before a stream counts as lost


@dataclass(frozen=True)
class Replaced:
    """A sample that could not be used, and the one read instead; both of the source of this number, as `k` is."""

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
    truncated: int = 0  # captions that were cut
    replaced: list[Replaced] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)  # of data workers that died: what to tell of each


class StepDataset(Dataset):
    """This rank's rows of every global batch, with all the randomness of the step.

    images: the images seen before index 0, its first k; skipped: the images left out. Item i is the i-th batch from
    there on, as n = batch_size / world_size rows of `k` int64 (n,), which image of the run, and of every field and
    draw that the config's parts declare (`data/declared.py`), such as
        image     uint8   (n, C, H, W)   pixels
        mirrored  bool    (n,)           where data.flip is set: whether it is to be
        label     int64   (n,)           of a model with classes
        time      float64 (n,)           in [0, 1)
    but for the draws that `Completion` makes. Every number is drawn by the key (seed, purpose, k). Raises UserError for
    data that cannot be used; with data.on_error "replace" a BadSample gives way to another sample of its stream.
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
        self._wanted = declared(config)
        self._order = of_run(data, config.run.seed, manifest)
        self._readers, self._samples = [], []
        sources = list(zip((manifest, *manifest.mixed), (data, *data.mix), strict=True))
        for one, source in sources:
            cache = cache_of(data, source.shards)
            self._readers.append(ShardReader(one, source.shards, cache, max(1, OPEN_SHARDS // len(sources))))
            self._samples.append(SampleReader(self._readers[-1], self._wanted.fields))
        self._draws = Draws(config.run.seed, config.run.generator)
        self.rank, self._world_size = rank, world_size
        self._first, self._batch_size = int(skipped.ordinal(images)), data.batch_size
        self._skipped = skipped
        self._centre_crop, self._random = Crop(data.image_size, data.scaling), data.crop == "random"
        self._flip = data.flip
        self._captions = [one for one in self._wanted.fields if isinstance(one, Caption | TokenCounts)]
        self._chooses = any(one.chooses for one in self._wanted.fields)
        self._replace = data.on_error == "replace"
        self._replaced: list[Replaced] = []
        self._counts, self._truncated = np.zeros(3, dtype=np.int64), 0

    def __getitem__(self, index: int) -> Batch:
        k, batch = self.read(index)
        first, keys = self._first + index * self._batch_size, k.tolist()
        ordinals = self._skipped.ordinal(k)
        for draw in self._wanted.sent:
            values = drawn(draw, self._draws, keys, ordinals, first, self._batch_size)
            batch[draw.name] = torch.from_numpy(values)
        return batch

    def read(self, index: int) -> tuple[np.ndarray, Batch]:
        """k (n,) of a batch, and the batch without its draws."""
        all_k = self._skipped.at(self._first + index * self._batch_size, self._batch_size)
        k = self._order.deal(all_k, self.rank, self._world_size)
        sources, samples = self._order.samples(k)
        for source, reader in enumerate(self._readers):
            reader.prefetch(samples[sources == source].tolist(), self._samples[source].extensions)
        views = [self._view_of(key) for key in k.tolist()]
        places = zip(k.tolist(), views, sources.tolist(), samples.tolist(), strict=True)
        rows = [self._read(*place) for place in places]
        batch = {field.name: field.collate([row[field.name] for row in rows]) for field in self._wanted.fields}
        self._truncated += sum(int(one.truncated(batch[one.name])) for one in self._captions)
        if self._flip:
            batch["mirrored"] = torch.tensor([view.mirrored for view in views])
        return k, {"k": torch.from_numpy(k)} | batch

    def take_report(self) -> Report:
        """What was read since the last call."""
        counts = np.sum([reader.counts for reader in self._readers], axis=0)
        report = Report(*(counts - self._counts).tolist(), self._truncated, self._replaced)
        self._counts, self._replaced, self._truncated = counts, [], 0
        return report

    def _read(self, k: int, view: View, source: int, sample: int) -> dict[str, np.ndarray]:
        try:
            return self._samples[source].read(sample, view)
        except BadSample as e:
            if not self._replace:
                raise
            problem = str(e)
        for number in range(SUBSTITUTES):
            other = self._order.substitute(k, number)
            try:
                read = self._samples[source].read(other, view)
            except BadSample:
                continue
            self._replaced.append(Replaced(k, source, sample, other, problem))
            return read
        raise UserError(f"{problem}; {SUBSTITUTES} substitutes of its stream cannot be used either")

    def _view_of(self, k: int) -> View:
        mirrored = self._flip and self._draws.uniform(Purpose.FLIP, k) < 0.5
        choice = self._draws.uniform(Purpose.CAPTION, k) if self._chooses else 0.0
        if not self._random:
            return View(self._centre_crop, mirrored, choice)
        draws = [self._draws.uniform(Purpose.CROP, k, sub) for sub in range(3)]
        return View(self._centre_crop._replace(draws=draws), mirrored, choice)


class Completion:
    """The rest of a batch, on the device that it has come to, such as
        image  float32 (n, C, H, W)   pixels in [−1, 1], mirrored where the row says so
        noise  float32 (n, C, H, W)   standard normal
    the same bits on every device. compiled: noise by torch.compile, where the device is none of NumPy's.
    """

    def __init__(self, config: Config, compiled: bool = False):
        self._wanted, self._compiled = declared(config), compiled
        self._draws = Draws(config.run.seed, config.run.generator)

    def __call__(self, batch: Batch) -> Batch:
        whole = {name: column for name, column in batch.items() if name != "mirrored"}
        for one in self._wanted.fields:
            whole[one.name] = one.complete(batch[one.name], batch.get("mirrored"))
        for draw in set(self._wanted.draws) - set(self._wanted.sent):
            at = draw.purpose, batch["k"], draw.shape
            whole[draw.name] = normals_on(self._draws, *at, compiled=self._compiled)
        return whole


def stand_in(wanted: Declared, first: int, rows: int) -> Batch:
    """Rows of the shapes of a completed batch, whose loss and gradient are not numbers."""
    batch = {"k": first + torch.arange(rows)}
    for one in wanted.fields:
        column = one.complete(torch.zeros(rows, *one.shape, dtype=getattr(torch, one.dtype)), None)
        batch[one.name] = column.fill_(torch.nan) if column.is_floating_point() else column
    for draw in wanted.draws:
        batch[draw.name] = torch.full((rows, *draw.shape), draw.typical, dtype=getattr(torch, draw.dtype))
    return batch
