"""Counter-based draws: a number is a pure function of (seed, purpose, index), never of rank, worker or history.

Philox-4x64 takes a 128-bit key and a 256-bit counter. Key = (seed, purpose), counter = (0, index, sub, 0): every
(index, sub) owns 2^64 words that no other one shares. No generator state is ever saved.

A run's generator says how normals are made of these words; all else is the same in both. 1: by NumPy's ziggurat, on
CPUs alone. 2: by `dtrain/normals.py`, the same bits on every device (`dtrain/device_draws.py`) and in less time.
"""

from collections.abc import Sequence
from math import prod

import numpy as np

from dtrain.draws import Draw
from dtrain.draws import Purpose as Purpose
from dtrain.draws import key_of as key_of
from dtrain.draws import purpose_of as purpose_of
from dtrain.normals import from_words

LARGEST = 1 - 2.0**-53  # the largest float64 below 1
_WORDS = 4096  # of several rows at a time


class Draws:
    """One Philox generator, re-keyed for each draw (1 µs), so that millions of streams cost no construction."""

    def __init__(self, seed: int, generator: int = 1):
        if not 0 <= seed < 2**64:
            raise ValueError(f"a seed lies in [0, 2^64), got {seed}")
        self.seed, self.generator = seed, generator
        self._bits = np.random.Philox(key=np.zeros(2, np.uint64))
        self._generator = np.random.Generator(self._bits)
        # Python integers, which NumPy takes out of a tuple four times faster than out of its own arrays.
        self._place = {"key": (seed, 0), "counter": (0, 0, 0, 0)}
        self._state = self._bits.state | {"state": self._place, "buffer": (0, 0, 0, 0), "buffer_pos": 4}

    def at(self, purpose: Purpose, index: int, sub: int = 0) -> np.random.Generator:
        """The generator at the start of stream (purpose, index, sub). Valid until the next call."""
        self._place["key"] = (self.seed, int(purpose))
        self._place["counter"] = (0, index, sub, 0)
        self._bits.state = self._state
        return self._generator

    def words(self, purpose: Purpose, index: int, sub: int = 0, size: int = 1) -> np.ndarray:
        """Raw uint64 words (size,): the Philox function itself, stable across NumPy versions."""
        self.at(purpose, index, sub)
        return self._bits.random_raw(size)

    def uniform(self, purpose: Purpose, index: int, sub: int = 0) -> float:
        """One float64 in [0, 1) with 53 random bits."""
        self.at(purpose, index, sub)
        return (self._bits.random_raw() >> 11) * 2.0**-53

    def normal(self, purpose: Purpose, index: int, shape: tuple[int, ...], sub: int = 0) -> np.ndarray:
        """Standard normals, float32, of the given shape."""
        return self.normals(purpose, [index], shape, sub)[0]

    def normals(self, purpose: Purpose, indices: Sequence[int], shape: tuple[int, ...], sub: int = 0) -> np.ndarray:
        """Standard normals of each index, float32 (n, *shape)."""
        values = np.empty((len(indices), prod(shape)), dtype=np.float32)
        if self.generator == 1:
            for row, index in enumerate(indices):
                self.at(purpose, index, sub).standard_normal(dtype=np.float32, out=values[row])
        else:
            self._look_up(purpose, indices, sub, values)
        return values.reshape(len(indices), *shape)

    def _look_up(self, purpose: Purpose, indices: Sequence[int], sub: int, values: np.ndarray) -> None:
        """Fill values (n, m), float32, as generator 2 does; short rows many at a time."""
        numel = values.shape[1]
        a_row = -(-numel // 2)  # words
        rows = max(1, _WORDS // max(1, a_row))
        for first in range(0, len(indices), rows):
            part = values[first : first + rows]
            words = [self.words(purpose, index, sub, a_row) for index in indices[first : first + rows]]
            words = words[0] if len(words) == 1 else np.concatenate(words)
            if numel % 2 == 0:
                from_words(words, part.reshape(-1))
            else:
                numbers = np.empty(2 * len(words), dtype=np.float32)
                from_words(words, numbers)
                part[:] = numbers.reshape(len(part), -1)[:, :numel]


def drawn(draw: Draw, draws: Draws, k: Sequence[int], ordinals: np.ndarray, first: int, batch_size: int) -> np.ndarray:
    """(n, *shape): the numbers of a draw for the images k of the run.

    ordinals (n,), first, batch_size: the global batch has the ordinals first … first + batch_size − 1, of which these
    rows have some: a stratified draw is (stratum + u)/B, and a permutation keyed (seed, first) gives each stratum to
    one row, so that a stream of the data set is not tied to one.
    """
    if draw.law == "normal":
        return draws.normals(draw.purpose, k, draw.shape)
    if draw.law == "word":
        return np.array([draws.words(draw.purpose, key)[0] for key in k], dtype=np.uint64).view(np.int64)
    values = np.array([draws.uniform(draw.purpose, key) for key in k])
    if draw.law == "stratified":
        strata = permutation(draws.words(Purpose.STRATUM, first, size=batch_size))
        return np.minimum((strata[ordinals - first] + values) / batch_size, LARGEST)
    return values


def permutation(words: np.ndarray) -> np.ndarray:
    """The permutation that sorts random words (ties in order of place): uniform, and stable across NumPy versions."""
    return np.argsort(words, kind="stable")
