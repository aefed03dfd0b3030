"""Seeded subsets of features: which rows a resampling metric takes is a function of (seed, use, number)."""

import numpy as np
import torch
from torch import Tensor

from dtrain.randomness import Draws, Purpose, permutation

# What a subset is for: the `sub` of its draw. Part of a seeded metric's value: append, never renumber.
KERNEL_SAMPLES, KERNEL_REFERENCE, EXTRAPOLATION, BOOTSTRAP = range(4)


class Subsets:
    def __init__(self, seed: int):
        self._draws = Draws(seed)

    def choose(self, total: int, size: int, number: int, use: int) -> Tensor:
        """`size` different rows of `total`, int64 (size,)."""
        words = self._draws.words(Purpose.SUBSET, number, use, total)
        return torch.from_numpy(permutation(words)[:size])

    def resample(self, total: int, number: int, use: int) -> Tensor:
        """`total` rows of `total` drawn with replacement, int64 (total,)."""
        words = self._draws.words(Purpose.SUBSET, number, use, total)
        return torch.from_numpy((words % np.uint64(total)).astype(np.int64))
