"""Pairs of noise and what was drawn from it: x_0 as it is, and its noise made again from its key."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain.data.fields.field import Array, Field, View
from dtrain.data.shards.sample_files import DRAWN_FIELD, NOISE_KEY_FIELD
from dtrain.draws import Purpose
from dtrain.errors import BadSample

if TYPE_CHECKING:
    import numpy as np


class Drawn(Array):
    """x_0 float32 (C, H, W), as the network sees it."""

    remedy = "draw the pairs again"

    def __init__(self, name: str, shape: Sequence[int]):
        super().__init__(name, DRAWN_FIELD, shape, "float32")

    def read(self, data: bytes, view: View) -> "np.ndarray":
        import numpy as np

        found = super().read(data, view)
        if not np.isfinite(found).all():
            raise BadSample("holds an x_0 that is not finite; draw the pairs again")
        return found


class NoiseOfKey(Field):
    """The standard normals float32 (C, H, W) that x_0 was drawn from. A file holds int64 (3,): seed, generator and id
    of the sample.
    """

    extensions, dtype, remedy = (NOISE_KEY_FIELD,), "float32", "draw the pairs again"

    def __init__(self, name: str, shape: Sequence[int]):
        self.name, self.shape = name, tuple(shape)

    def read(self, data: bytes, view: View) -> "np.ndarray":
        from dtrain.data.fields.npy import read_array
        from dtrain.randomness import Draws

        seed, generator, number = read_array(data, "int64", [3]).tolist()
        if seed < 0 or generator not in (1, 2) or number < 0:
            raise BadSample(f"holds {[seed, generator, number]}, no key of noise; draw the pairs again")
        return Draws(seed, generator).normal(Purpose.SAMPLE_NOISE, number, self.shape)
