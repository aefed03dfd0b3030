"""Where the samples of a run's images lie in its shards, for people who want to look at them."""

import numpy as np

from dtrain.config import Data
from dtrain.data.order.mixture import of_run
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.remote import is_url, shown


class SampleNames:
    """Where the samples of images k lie. seed: of the run."""

    def __init__(self, data: Data, seed: int, manifest: Manifest):
        self._data, self._seed, self._manifests = data, seed, (manifest, *manifest.mixed)
        self._folders = [source.shards for source in (data, *data.mix)]

    def by_shard(self, k: np.ndarray) -> dict[str, list[int]]:
        """Shard → which of its samples the images k (n,) are, counted from 0. Reads nothing."""
        found: dict[str, list[int]] = {}
        for shard, number, _, _ in self._located(k):
            found.setdefault(shard, []).append(number)
        return {shard: sorted(numbers) for shard, numbers in found.items()}

    def of(self, k: np.ndarray) -> list[str]:
        """`shard: member` of a few images k (n,), as each shard is read up to its sample; remote: `shard: sample 7`."""
        names = []
        for shard, number, source, sample in self._located(k):
            remote = is_url(self._folders[source])
            reader = None if remote else ShardReader(self._manifests[source], self._folders[source])
            names.append(f"{shard}: sample {number}" if remote else reader.name(sample))
        return names

    def _located(self, k: np.ndarray) -> list[tuple[str, int, int, int]]:
        """(shard, number in there, source, sample of the source) of each image."""
        found, mixture = [], of_run(self._data, self._seed, self._manifests[0])
        for source, sample in zip(*mixture.samples(k), strict=True):
            sizes = self._manifests[source].shard_sizes
            shard = int(np.searchsorted(np.cumsum(sizes), sample, side="right"))
            folder, name = self._folders[source], self._manifests[source].shards[shard].name
            name = shown(folder, name, shard) if is_url(folder) else f"{folder}/{name}"
            found.append((name, int(sample - sizes[:shard].sum()), int(source), int(sample)))
        return found
