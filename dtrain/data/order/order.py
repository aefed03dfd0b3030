"""The order of samples: a pure function of (seed, k), with no state and no I/O (design, decision 1).

The data set is cut into `streams` parts of equal length that are read side by side; within a stream samples are
shuffled inside windows, so that a reader touches few shards at a time. The whole position of a run is one integer, the
images seen; world size, batch size and worker count do not enter.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dtrain.randomness import Draws, Purpose, permutation


class Order:
    """Which sample is the k-th image of the run, k from 0.

    Image k belongs to stream v = k mod V as its q-th, q = k div V. An epoch takes L = N // V samples of every stream;
    within it, i = q mod L lies in window w = i div W, and a window is permuted within itself.

    seed: the run's seed. shard_sizes: samples of each shard, in the manifest's order (N is their sum).
    streams: V, from 1 to N. window: W in samples of one stream; W ≥ L shuffles each stream as a whole.
    Raises ValueError for values outside these ranges.

    Memory: at most V windows of 4·min(W, L) bytes, whatever N is.
    """

    def __init__(self, seed: int, shard_sizes: Sequence[int] | np.ndarray, streams: int, window: int):
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if sizes.ndim != 1 or not sizes.size or sizes.min() < 1:
            raise ValueError("every shard must have a sample, and there must be a shard")
        self.samples = int(sizes.sum())
        if not 1 <= streams <= self.samples:
            raise ValueError(f"streams must lie between 1 and the {self.samples} samples, got {streams}")
        if window < 1:
            raise ValueError(f"a window holds at least 1 sample, got {window}")
        self.streams = int(streams)
        self.stream_length = self.samples // self.streams
        self.window = min(int(window), self.stream_length)
        # `_permute_window` numbers each by 32 bits, whatever the number of samples is.
        if max(self.streams, self.window, -(-self.stream_length // self.window)) > 2**32:
            raise ValueError(
                f"{self.samples} samples in {self.streams} streams, in windows of {self.window}: there are at most "
                "2^32 streams, windows in one, and samples in a window"
            )
        self._sizes = sizes
        self._starts = np.cumsum(sizes) - sizes  # first sample of each shard, manifest order
        self._draws = Draws(seed)
        # A reader that goes forward needs one window of each stream and never an older one: see `sample`.
        self._shuffled = lru_cache(maxsize=self.streams)(self._permute_window)
        self._epoch = lru_cache(maxsize=2)(self._permute_shards)

    def sample(self, k: np.ndarray) -> np.ndarray:
        """Samples (n,) int64 of the k-th images of the run, k (n,) int64 ≥ 0, in any order.

        Samples are counted from 0 through the shards in the manifest's order. The cost does not depend on k.
        """
        k = np.asarray(k, dtype=np.int64)
        if k.size and k.min() < 0:
            raise ValueError(f"images are counted from 0, got {k.min()}")
        q, v = np.divmod(k, self.streams)
        epoch, i = np.divmod(q, self.stream_length)
        w, offset = np.divmod(i, self.window)

        # In this order (epoch, window, stream) a batch that crosses a window's end is done with every old window before
        # it asks for the first new one, so a cache of V windows never computes one twice.
        by_window = np.lexsort((v, w, epoch))
        shuffled = np.empty_like(k)
        for rows in _runs(by_window, epoch, w, v):
            first = rows[0]
            shuffled[rows] = self._shuffled(int(epoch[first]), int(v[first]), int(w[first]))[offset[rows]]
        entry = v * self.stream_length + w * self.window + shuffled  # of all streams, one after the other

        sample = np.empty_like(k)
        for rows in _runs(by_window, epoch):
            rotation, shards, ends = self._epoch(int(epoch[rows[0]]))
            p = (entry[rows] + rotation) % self.samples  # in the concatenation of the permuted shards
            j = np.searchsorted(ends, p, side="right")
            sample[rows] = p - ends[j] + (self._starts + self._sizes)[shards[j]]
        return sample

    def substitute(self, k: int, number: int) -> int:
        """The sample to try instead when image k's cannot be used: another of its stream and epoch, drawn by its key.

        number: 0, 1, …, until a sample is whole.
        """
        stream, q = k % self.streams, k // self.streams
        word = self._draws.words(Purpose.SUBSTITUTE, k, number)[0]
        i = int(word % np.uint64(self.stream_length))
        instead = (q // self.stream_length * self.stream_length + i) * self.streams + stream
        return int(self.sample(np.array([instead]))[0])

    def rows(self, first: int, batch: int, rank: int, world_size: int) -> np.ndarray:
        """k (batch / world_size,) int64 of this rank's rows of the global batch that begins at k = `first`.

        The batch is sorted by (stream, k) and cut into one piece a rank, so that a rank reads few streams.
        """
        if batch % world_size:
            raise ValueError(f"a batch of {batch} does not divide by {world_size} ranks")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        return self.deal(np.arange(first, first + batch, dtype=np.int64), rank, world_size)

    def deal(self, k: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """This rank's piece of the rising k (batch,) int64 of a global batch, sorted by (stream, k)."""
        k = k[np.argsort(k % self.streams, kind="stable")]
        n = len(k) // world_size
        return k[rank * n : (rank + 1) * n]

    def _permute_window(self, epoch: int, stream: int, window: int) -> np.ndarray:
        """Permutation (size,) uint32 of one window; the last window of a stream may be shorter."""
        size = min(self.window, self.stream_length - window * self.window)
        # Streams and windows stay below 2^32, so each (stream, window) has a `sub` of its own.
        words = self._draws.words(Purpose.WINDOW_ORDER, epoch, stream << 32 | window, size)
        return permutation(words).astype(np.uint32)

    def _permute_shards(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        """An epoch's rotation r_e, its order of the shards (S,), samples up to the end of each (S,) int64."""
        rotation = int(self._draws.words(Purpose.ROTATION, epoch)[0] % np.uint64(self.samples))
        shards = permutation(self._draws.words(Purpose.SHARD_ORDER, epoch, size=self._sizes.size))
        return rotation, shards, np.cumsum(self._sizes[shards])


def _runs(order: np.ndarray, *keys: np.ndarray) -> list[np.ndarray]:
    """Cut `order`, which sorts `keys`, where any key changes; no runs of nothing."""
    if not order.size:
        return []
    changed = np.zeros(order.size - 1, dtype=bool)
    for key in keys:
        changed |= np.diff(key[order]) != 0
    return np.split(order, np.flatnonzero(changed) + 1)
