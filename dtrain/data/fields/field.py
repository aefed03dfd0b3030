"""A field: one file of a sample, and what becomes of it in a batch. Imports no torch and no NumPy where it declares."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from dtrain.data.shards.sample_files import IMAGE_FIELDS, LABEL_FIELD, class_number
from dtrain.errors import BadSample

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dtrain.data.fields.picture import Crop


class View(NamedTuple):
    """How a sample is looked at, a function of its k: all fields that belong to the picture are looked at alike.

    mirrored: of a field that `read` mirrors; one that `complete` mirrors is told there. choice: in [0, 1), of a field
    that chooses among several things of a sample.
    """

    crop: "Crop"  # uint8 (C, H, W) → (C, S, S)
    mirrored: bool = False
    choice: float = 0.0


class Field:
    """What fields of all kinds have; a plug-in's own is a subclass with `read`.

    name: in the batch. extensions: of the files that it may be, the first that a sample has is read. shape, dtype: of
    a row of the batch that a worker makes, dtype as NumPy calls it. described: as a message calls it. chooses: whether
    it reads `View.choice`.
    """

    name: str
    extensions: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    chooses = False
    remedy = "pack it without"

    @property
    def described(self) -> str:
        return f"a {self.extensions[0]}"

    @property
    def row_bytes(self) -> int:
        bits = int("".join(c for c in self.dtype if c.isdigit()) or 8)
        return prod(self.shape) * bits // 8

    def read(self, data: bytes, view: View) -> "np.ndarray":
        """The file's bytes as an array. Raises BadSample that says what is wrong; its caller says of which sample."""
        raise NotImplementedError

    def collate(self, rows: "Sequence[np.ndarray]") -> "Tensor":
        """(n, *shape) of what `read` gave of n samples."""
        import numpy as np
        import torch

        return torch.from_numpy(np.stack(rows))

    def complete(self, column: "Tensor", mirrored: "Tensor | None") -> "Tensor":
        """(n, *shape) on the device of the training, of what `collate` gave: what can be computed there.

        mirrored: bool (n,), or None where no row is.
        """
        return column


class Picture(Field):
    """An image file, cropped as the view says: uint8 (C, S, S), completed to float32 in [−1, 1], mirrored by chance."""

    remedy = "pack the shard without it"
    dtype = "uint8"

    def __init__(self, name: str, size: int, channels: int, upright: bool = True, extensions=IMAGE_FIELDS):
        self.name, self.extensions, self.shape = name, extensions, (channels, size, size)
        self._channels, self._upright = channels, upright

    @property
    def described(self) -> str:
        return "a jpg, jpeg, png or webp" if self.extensions == IMAGE_FIELDS else f"a {self.extensions[0]}"

    def read(self, data: bytes, view: View) -> "np.ndarray":
        """uint8 (C, S, S): a quarter of the bytes that `complete` makes of it."""
        try:
            image = view.crop.of(data, self._channels, self._upright)
        except BadSample as e:
            raise BadSample(f"{e}; restore it, or pack the shard without it") from None
        return image.numpy()

    def complete(self, column: "Tensor", mirrored: "Tensor | None") -> "Tensor":
        from dtrain.data.fields.picture import mirror, normalize

        return normalize(column if mirrored is None else mirror(column, mirrored))


class Label(Field):
    """A class number below `num_classes`, int64."""

    remedy = "pack the shard without it"
    extensions, shape, dtype = (LABEL_FIELD,), (), "int64"
    described = f"a `{LABEL_FIELD}` label"

    def __init__(self, name: str, num_classes: int):
        self.name, self._num_classes = name, num_classes

    def read(self, data: bytes, view: View) -> "np.ndarray":
        import numpy as np

        label = label_in(data)
        if label >= self._num_classes:
            raise BadSample(
                f"holds the label {label}, but model.num_classes is {self._num_classes}, so labels go from 0 to "
                f"{self._num_classes - 1}"
            )
        return np.int64(label)


class Array(Field):
    """A .npy file of one shape and dtype, as it is: neither cropped nor mirrored."""

    def __init__(self, name: str, extension: str, shape: Sequence[int], dtype: str):
        self.name, self.extensions, self.shape, self.dtype = name, (extension,), tuple(shape), dtype

    def read(self, data: bytes, view: View) -> "np.ndarray":
        from dtrain.data.fields.npy import read_array

        return read_array(data, self.dtype, list(self.shape))


class RaggedArray(Array):
    """One that may be shorter along its first axis, which zeros fill up."""

    def read(self, data: bytes, view: View) -> "np.ndarray":
        import numpy as np

        from dtrain.data.fields.npy import read_array

        length = self.length(data)
        row = np.zeros(self.shape, dtype=self.dtype)
        row[:length] = read_array(data, self.dtype, [length, *self.shape[1:]])
        return row

    def length(self, data: bytes) -> int:
        """How many of a file's rows there are. Raises BadSample for too many."""
        from dtrain.data.fields.npy import header

        shape, _ = header(data)
        if len(shape) != len(self.shape) or shape[0] > self.shape[0]:
            raise BadSample(f"holds {list(shape)}, not at most {list(self.shape)}")
        return shape[0]


class Mask(Field):
    """Which rows of a ragged array there are, bool (L,)."""

    dtype = "bool"

    def __init__(self, array: RaggedArray):
        self.name, self.extensions, self.shape = f"{array.name}_mask", array.extensions, array.shape[:1]
        self._array = array

    def read(self, data: bytes, view: View) -> "np.ndarray":
        import numpy as np

        return np.arange(self.shape[0]) < self._array.length(data)


def arrays_of(name: str, extension: str, shape: Sequence[int], dtype: str, ragged: bool) -> list[Field]:
    """The array of `data.arrays.NAME`, and its mask where it is ragged."""
    if not ragged:
        return [Array(name, extension, shape, dtype)]
    array = RaggedArray(name, extension, shape, dtype)
    return [array, Mask(array)]


def label_in(data: bytes) -> int:
    """The class number that a label's file holds. Raises BadSample."""
    number = class_number(data)
    if number is None:
        shown = data[:20].decode("ascii", "backslashreplace")
        raise BadSample(f"holds {shown!r}, not a class number; correct it")
    return number
