"""Several sources in one order of images, by weight, still a pure function of the images seen.

Of every 1,024 images, a block, each source gives a whole number, its quota, and a permutation keyed by (seed, block)
says which. So an image's own k, within its source, is the source's quota times the blocks before, and how many of the
source come before it within the block.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dtrain.config import Data
from dtrain.data.order.order import Order
from dtrain.data.order.streams import MIXED, default_streams, with_streams
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import UserError
from dtrain.randomness import Draws, Purpose, key_of, permutation

BLOCK = 1024  # images


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Images of each source in a block (S,) int64: nearest to the weights' shares (largest remainders), sum 1,024."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * BLOCK
    whole = np.floor(exact).astype(np.int64)
    for source in np.argsort(whole - exact, kind="stable")[: BLOCK - whole.sum()]:
        whole[source] += 1
    return whole


class Mixture:
    """Which sample of which source is the k-th image of the run. One source gives exactly its own order."""

    def __init__(self, seed: int, orders: Sequence[Order], weights: Sequence[float]):
        self.orders = list(orders)
        self._quotas = quotas(weights)
        if self._quotas.min() < 1:
            raise ValueError(f"a source of weight {min(weights)} gives less than one of {BLOCK} images")
        self._draws = Draws(seed)
        self._block = lru_cache(maxsize=16)(self._lay_out)

    def locate(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source (n,) of image k of the run, and its own k (n,) within that source; both int64."""
        k = np.asarray(k, dtype=np.int64)
        if len(self.orders) == 1:
            return np.zeros_like(k), k
        source, own_k = np.empty_like(k), np.empty_like(k)
        blocks, offsets = np.divmod(k, BLOCK)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            sources, before = self._block(block)
            source[here] = sources[offsets[here]]
            own_k[here] = block * self._quotas[source[here]] + before[offsets[here]]
        return source, own_k

    def samples(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, sample of that source) of image k, each (n,) int64."""
        source, own_k = self.locate(k)
        sample = np.empty_like(own_k)
        for s, order in enumerate(self.orders):
            sample[source == s] = order.sample(own_k[source == s])
        return source, sample

    def substitute(self, k: int, number: int) -> int:
        """The sample to try instead of image k's, of the same source and stream."""
        source, own_k = self.locate(np.array([k]))
        return self.orders[source[0]].substitute(int(own_k[0]), number)

    def rows(self, first: int, batch: int, rank: int, world_size: int) -> np.ndarray:
        """k of this rank's rows: the batch sorted by (source, stream, k) and cut into one piece a rank."""
        return self.deal(np.arange(first, first + batch, dtype=np.int64), rank, world_size)

    def deal(self, k: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """This rank's piece of the rising k (batch,) int64 of a global batch, sorted likewise."""
        if len(self.orders) == 1:
            return self.orders[0].deal(k, rank, world_size)
        source, own_k = self.locate(k)
        streams = np.array([order.streams for order in self.orders])
        k = k[np.lexsort((k, own_k % streams[source], source))]
        n = len(k) // world_size
        return k[rank * n : (rank + 1) * n]

    def counts(self, images: int) -> list[int]:
        """How many of the run's first `images` images came from each source."""
        blocks, rest = divmod(images, BLOCK)
        source, _ = self.locate(np.arange(blocks * BLOCK, blocks * BLOCK + rest))
        return (blocks * self._quotas + np.bincount(source, minlength=len(self.orders))).tolist()

    def _lay_out(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each image of a block, and how many of that source come before it; each (1024,) int64."""
        sources = np.repeat(np.arange(len(self.orders)), self._quotas)
        sources = sources[permutation(self._draws.words(Purpose.MIXTURE, block, size=BLOCK))]
        before = np.empty_like(sources)
        for s, quota in enumerate(self._quotas):
            before[sources == s] = np.arange(quota)
        return sources, before


def of_run(data: Data, seed: int, manifest: Manifest) -> Mixture:
    """The order of a run's images; `manifest` holds those of data.mix. Raises UserError for what cannot be mixed.

    seed: of the run.
    """
    streams = with_streams(data, manifest).streams
    orders = [Order(seed, manifest.shard_sizes, streams, data.shuffle_window)]
    for source, other in zip(data.mix, manifest.mixed, strict=True):
        own = key_of(f"{seed} {source.name}") >> 1  # sources of equal shape must not go in step
        orders.append(Order(own, other.shard_sizes, default_streams(other.samples, MIXED), data.shuffle_window))
    try:
        return Mixture(seed, orders, [data.weight, *(s.weight for s in data.mix)])
    except ValueError as e:
        raise UserError(f"data.mix: {e}; raise its weight or leave it out") from None
