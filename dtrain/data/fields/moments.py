"""The moments of a picture's latent, out of a latent cache (design, decision 11)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain.data.fields.field import Field, View
from dtrain.data.shards.sample_files import MOMENTS_FIELD
from dtrain.errors import BadSample

if TYPE_CHECKING:
    import numpy as np

DTYPES = ("float32", "float16")  # of the files


class Moments(Field):
    """Mean and standard deviation, float32 (2, C, h, w), of the picture or of its mirror, as the view says.

    A file holds both, or the picture's alone, as one of DTYPES (1 or 2, 2, C, h, w): a mirrored latent is not the
    latent of the mirrored picture.
    """

    extensions, dtype = (MOMENTS_FIELD,), "float32"

    def __init__(self, name: str, shape: Sequence[int]):
        self.name, self.shape = name, (2, *shape)

    def read(self, data: bytes, view: View) -> "np.ndarray":
        import numpy as np

        from dtrain.data.fields.npy import header, read_array

        shape, dtype = header(data)
        if str(dtype) not in DTYPES or shape[1:] != self.shape or shape[0] not in (1, 2):
            raise BadSample(f"holds {dtype} {list(shape)}, not moments of {list(self.shape[1:])}; encode it again")
        if view.mirrored and shape[0] == 1:
            raise BadSample("holds no moments of the mirrored picture; encode with --mirrors")
        found = read_array(data, str(dtype), list(shape))[int(view.mirrored)].astype(np.float32)
        if not np.isfinite(found).all():
            raise BadSample("holds moments that are not finite; encode it again")
        return found
