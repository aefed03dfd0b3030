"""One sample's fields as tensors: its picture, its label, its arrays. All that can be wrong with it is a BadSample."""

import io
import math
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from dtrain.config import ArrayField
from dtrain.data.fields.picture import centre_crop, decode
from dtrain.data.shards.cache import BlockCache
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.sample_files import DOT_RULE, IMAGE_FIELDS, LABEL_FIELD, class_number, dotted
from dtrain.errors import BadSample

_LABELS = 1024  # read at a time of a remote split
# What NumPy lets through for a header that is none, seen on mutated files.
_BAD_HEADER = (ValueError, TypeError, SyntaxError, KeyError, EOFError, OverflowError, MemoryError, RecursionError)
_BAD_HEADER += (tokenize.TokenError,)


class SampleReader:
    """Samples as they are trained on. Only these fields are ever read; fields that run code (.pkl, .pyd, .pt) never.

    num_classes: labels are checked against it; 0: labels are not read. upright: turned as their EXIF data say.
    """

    def __init__(
        self,
        reader: ShardReader,
        channels: int,
        num_classes: int,
        arrays: dict[str, ArrayField],
        upright: bool = True,
    ):
        self._reader, self._channels, self._num_classes, self._arrays = reader, channels, num_classes, arrays
        self._upright = upright
        labels = (LABEL_FIELD,) if num_classes else ()
        self.fields = (*IMAGE_FIELDS, *labels, *(a.field for a in arrays.values()))

    def read(
        self, sample: int, crop: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, int, dict[str, np.ndarray]]:
        """Its picture, uint8 (C, H, W) as `crop` leaves it, its label, 0 for none, and its arrays by name."""
        data = self._reader.read(sample, self.fields)
        arrays = {name: self._array(sample, data, wanted) for name, wanted in self._arrays.items()}
        label = self._label(sample, data) if self._num_classes else 0
        return picture(self._reader, sample, data, self._channels, crop, self._upright), label, arrays

    def _label(self, sample: int, data: dict[str, bytes]) -> int:
        label = label_of(self._reader, sample, data)
        if label >= self._num_classes:
            raise BadSample(
                f"{self._reader.name(sample, LABEL_FIELD)} holds the label {label}, but model.num_classes is "
                f"{self._num_classes}, so labels go from 0 to {self._num_classes - 1}"
            )
        return label

    def _array(self, sample: int, data: dict[str, bytes], wanted: ArrayField) -> np.ndarray:
        if wanted.field not in data:
            hint = _hint(self._reader, sample, (wanted.field,)) or "; pack it without"
            raise BadSample(f"{self._reader.name(sample)} is of a sample without a {wanted.field}{hint}")
        try:
            return read_array(data[wanted.field], wanted.dtype, wanted.shape)
        except BadSample as e:
            raise BadSample(f"{self._reader.name(sample, wanted.field)} {e}") from None


def read_array(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    """A .npy file's array, which must have this dtype and shape: nothing is allocated for what its header promises.

    Raises BadSample. No pickle is read: an array of objects would run code.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"version {version[0]}.{version[1]} of the format is not known")
        got_shape, fortran, got_dtype = read_header[version](file)
        if got_dtype.hasobject:
            raise ValueError("it holds pickled objects, which only allow_pickle=True would load")
    except _BAD_HEADER as e:
        reason = str(e).splitlines()[0] if str(e) else "it is cut off"
        raise BadSample(f"is no .npy array that can be read ({reason})") from None
    if got_dtype != dtype or list(got_shape) != shape:
        raise BadSample(f"holds {got_dtype} {list(got_shape)}, not {dtype} {shape}")
    values = data[file.tell() :]
    if len(values) != got_dtype.itemsize * math.prod(shape):
        raise BadSample(f"is no .npy array that can be read (it has {len(values)} bytes of values for {dtype} {shape})")
    array = np.frombuffer(values, got_dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype)  # in the machine's byte order, and a copy that may be written to


def picture(
    reader: ShardReader,
    sample: int,
    data: dict[str, bytes],
    channels: int,
    crop: Callable[[torch.Tensor], torch.Tensor],
    upright: bool,
) -> torch.Tensor:
    """The first image among the fields read, uint8 (channels, H, W)."""
    field = next((f for f in IMAGE_FIELDS if f in data), None)
    if field is None:
        hint = _hint(reader, sample, IMAGE_FIELDS) or "; pack the shard without it"
        raise BadSample(f"{reader.name(sample)} is of a sample without a jpg, jpeg, png or webp{hint}")
    try:
        return crop(decode(data[field], channels, upright))
    except BadSample as e:
        raise BadSample(f"{reader.name(sample, field)} {e}; restore it, or pack the shard without it") from None


def label_of(reader: ShardReader, sample: int, data: dict[str, bytes]) -> int:
    text = data.get(LABEL_FIELD)
    if text is None:
        hint = _hint(reader, sample, (LABEL_FIELD,)) or "; pack the shard without it"
        raise BadSample(f"{reader.name(sample)} is of a sample without a `cls` label{hint}")
    number = class_number(text)
    if number is None:
        shown = text[:20].decode("ascii", "backslashreplace")
        raise BadSample(f"{reader.name(sample, LABEL_FIELD)} holds {shown!r}, not a class number; correct it")
    return number


def _hint(reader: ShardReader, sample: int, wanted: Iterable[str]) -> str:
    other = dotted(reader.fields_of(sample), wanted)
    return f" but with a `{other}`: {DOT_RULE}" if other else ""


def read_split(
    manifest: Manifest,
    directory: str | Path,
    image_size: int,
    channels: int,
    start: int,
    stop: int,
    cache: BlockCache | None = None,
    upright: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples start..stop of a split in the manifest's order: uint8 (n, C, H, W), and labels int64 (n,), 0 without.

    upright: turned as their EXIF data say.
    """
    reader = ShardReader(manifest, directory, cache)
    samples = range(start, stop)
    reader.prefetch(samples, (*IMAGE_FIELDS, LABEL_FIELD))
    images = torch.empty((len(samples), channels, image_size, image_size), dtype=torch.uint8)
    labels = torch.zeros(len(samples), dtype=torch.int64)
    for row, sample in enumerate(samples):
        data = reader.read(sample, (*IMAGE_FIELDS, LABEL_FIELD))
        images[row] = picture(reader, sample, data, channels, lambda image: centre_crop(image, image_size), upright)
        if LABEL_FIELD in manifest.fields:
            labels[row] = label_of(reader, sample, data)
    return images, labels


def read_labels(manifest: Manifest, directory: str | Path, cache: BlockCache | None = None) -> torch.Tensor:
    """The labels of a whole split in the manifest's order, int64 (N,), 0 without; no image is read."""
    if LABEL_FIELD not in manifest.fields:
        return torch.zeros(manifest.samples, dtype=torch.int64)
    reader = ShardReader(manifest, directory, cache)
    labels = []
    for start in range(0, manifest.samples, _LABELS):
        samples = range(start, min(start + _LABELS, manifest.samples))
        reader.prefetch(samples, (LABEL_FIELD,))
        labels += [label_of(reader, sample, reader.read(sample, (LABEL_FIELD,))) for sample in samples]
    return torch.tensor(labels)
