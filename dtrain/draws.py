"""Which random numbers there are: what each is for, and which of them come with every row of a batch.

Imports no NumPy: `dtrain/randomness.py` makes the numbers.
"""

import hashlib
from enum import IntEnum, unique
from math import prod
from typing import Literal, NamedTuple


@unique
class Purpose(IntEnum):
    """What a draw is for. The numbers are part of every run's identity: append, never renumber."""

    SHARD_ORDER = 1
    ROTATION = 2
    WINDOW_ORDER = 3
    TIME = 4
    NOISE = 5
    LABEL_DROP = 6
    FLIP = 7
    CROP = 8
    DROPOUT = 9
    INITIAL_WEIGHT = 10
    SAMPLE_NOISE = 11
    SAMPLE_STEP_NOISE = 12
    SAMPLE_LABEL = 13
    SPLIT = 14
    SUBSET = 15
    STRATUM = 16
    VALIDATION_NOISE = 17
    SUBSTITUTE = 18
    MIXTURE = 19
    POSTERIOR = 20
    CAPTION = 21
    DEQUANTISATION = 22
    TRACE_PROBE = 23
    VALIDATION_TIME = 24
    OTHER_TIME = 25
    SPAN = 26
    LATENT = 27
    STEP_NOISE = 28
    REVERSE_NOISE = 29
    SAMPLE_LATENT = 30


_LAWS = {"uniform": ("float64", 0.5), "stratified": ("float64", 0.5), "normal": ("float32", 0.0), "word": ("int64", 0)}


class Draw(NamedTuple):
    """Random numbers of each row of a batch, a function of (seed, purpose, k) alone.

    name: in the batch. purpose: a `Purpose`, or `randomness.purpose_of(name)` for a plug-in's own. law: uniform in
    [0, 1), float64; stratified: the same, with one row of the global batch in each of its B equal parts of [0, 1);
    normal: standard normals, float32; word: 64 random bits, int64. shape: of one row, for normals.
    """

    name: str
    purpose: int
    law: Literal["uniform", "normal", "word", "stratified"]
    shape: tuple[int, ...] = ()

    @property
    def dtype(self) -> str:
        return _LAWS[self.law][0]

    @property
    def typical(self) -> float:
        """A value that stands in where there is no row."""
        return _LAWS[self.law][1]

    @property
    def row_bytes(self) -> int:
        return int(self.dtype[-2:]) // 8 * prod(self.shape)


def purpose_of(name: str) -> int:
    """The purpose of a draw that is named: a number above those of `Purpose`, from a name such as `author.noise`."""
    return (1 << 63) | key_of(name)


def key_of(name: str) -> int:
    """A 64-bit stream index for a name, such as a parameter's."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
