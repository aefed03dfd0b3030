"""References that evaluations have computed, kept to be used again: beside the split, else in ~/.cache/dtrain.

Unlike the file that `dtrain reference` writes, which a user names and looks after, these are found by what they were
made from: the data, the features and their preprocessing are in the name in short and in the file in full. Of other
data there is another file, so none is ever stale, and a damaged one is computed again.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtrain.errors import UserError
from dtrain.evaluation.features.weights import cache_folder
from dtrain.evaluation.metrics.statistics import DAMAGES, Statistics, read, save

LARGEST = 2**28  # bytes of a file: a covariance of many pixels would take gigabytes


class ReferenceStore:
    """The files of one `reference.Origin`, of `count` images and `dimensions` features each."""

    def __init__(self, source, folder: Path, name: str, count: int, dimensions: int):
        """folder: the split's. name: of the file, without what tells it from others."""
        self._source, self._count, self._dimensions = source, count, dimensions
        file = f"{name}-{source.fingerprint[:16]}.npz"
        self._places = (folder / file, cache_folder() / "references" / file)

    def find(self, with_features: bool) -> tuple[Path, Statistics] | None:
        """A whole file of exactly this source; with features where they are wanted."""
        for path in self._places:
            try:
                stored = read(path)
                if stored.fingerprint != self._source.fingerprint or not self._is_ours(stored.source):
                    continue
                if (stored.statistics.count, stored.statistics.dimensions) != (self._count, self._dimensions):
                    continue
                if with_features and self.features(path) is None:
                    continue
            except UserError:  # not there, or damaged: then it is made again
                continue
            return path, stored.statistics
        return None

    def _is_ours(self, source: str | None) -> bool:
        """The same but for where the data lie."""
        try:
            return asdict(self._source) | {"manifest": None} == json.loads(source) | {"manifest": None}
        except (ValueError, TypeError):
            return False

    def features(self, path: Path) -> Tensor | None:
        """float32 (count, dimensions) of a file, if it holds them whole."""
        try:
            with np.load(path, allow_pickle=False) as f:
                found = f["features"]
        except DAMAGES:
            return None
        fits = (found.dtype, found.shape) == (np.float32, (self._count, self._dimensions))
        return torch.from_numpy(found) if fits and np.isfinite(found).all() else None

    def keep(self, statistics: Statistics, features: Tensor | None) -> str:
        """Write the file where it can be written; what to tell the user."""
        size = statistics.cov.nbytes
        if size > LARGEST:
            return f"the reference is not kept: it would take {size / 2**20:,.0f} MiB"
        if features is not None and size + features.nbytes > LARGEST:
            features = None
        problem = None
        for path in self._places:
            if path.parent == self._places[0].parent and not os.access(path.parent, os.W_OK):
                continue
            try:
                about = json.dumps(asdict(self._source))
                save(statistics, path, self._source.fingerprint, about, None if features is None else features.numpy())
                return f"the reference of {statistics.count:,} images is kept in {path}"
            except OSError as e:
                problem = f"{path}: {e.strerror}"
        return f"the reference could not be kept: {problem}"
