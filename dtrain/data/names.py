"""What the images of a run are called in its shards, for people who want to look at them."""

import numpy as np

from dtrain.config import Config
from dtrain.data.manifest import Manifest
from dtrain.data.mixture import of_run
from dtrain.data.remote import is_url
from dtrain.data.shards import ShardReader


class SampleNames:
    """Names of images by their place k in the run's order. Nothing is read before the first is asked for."""

    def __init__(self, config: Config, manifest: Manifest):
        self._config, self._manifest = config, manifest

    def __call__(self, k: np.ndarray) -> list[str]:
        """`shard: member` of each image k (n,); of remote shards, which are not read for it, `shard: sample i`."""
        data, manifests = self._config.data, (self._manifest, *self._manifest.mixed)
        places = [source.shards for source in (data, *data.mix)]
        readers = [
            None if is_url(place) else ShardReader(one, place) for one, place in zip(manifests, places, strict=True)
        ]
        names = []
        for source, sample in zip(*of_run(self._config, self._manifest).samples(k), strict=True):
            if readers[source] is not None:
                names.append(readers[source].name(int(sample)))
                continue
            ends = np.cumsum(manifests[source].shard_sizes)
            shard = int(np.searchsorted(ends, sample, side="right"))
            within = int(sample - ends[shard] + manifests[source].shards[shard].samples)
            names.append(f"{places[source]}/{manifests[source].shards[shard].name}: sample {within}")
        return names
