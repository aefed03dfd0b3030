"""One sample's fields as arrays. All that can be wrong with it is a BadSample."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from dtrain.data.fields.caption import Caption
from dtrain.data.fields.field import Field, Label, Picture, View
from dtrain.data.fields.moments import Moments
from dtrain.data.fields.picture import Crop
from dtrain.data.shards.cache import BlockCache
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.sample_files import DOT_RULE, IMAGE_FIELDS, LABEL_FIELD, dotted
from dtrain.errors import BadSample

ANY_LABEL = Label("label", sys.maxsize)  # of a split, whose labels a reference judges as a whole
NO_VIEW = View(Crop(1))  # of fields that are no pictures
_LABELS = 1024  # read at a time of a remote split


class SampleReader:
    """Samples as they are trained on. Only these fields are ever read; fields that run code (.pkl, .pyd, .pt) never."""

    def __init__(self, reader: ShardReader, fields: Sequence[Field]):
        self._reader, self._fields = reader, fields
        self.extensions = tuple(extension for field in fields for extension in field.extensions)

    def read(self, sample: int, view: View) -> dict[str, np.ndarray]:
        """Each field's array by its name. Raises BadSample."""
        data = self._reader.read(sample, self.extensions)
        return {field.name: read_field(self._reader, sample, data, field, view) for field in self._fields}


def read_field(reader: ShardReader, sample: int, data: dict[str, bytes], field: Field, view: View) -> np.ndarray:
    """One field out of a sample's files. Raises BadSample, with the sample's name."""
    extension = next((e for e in field.extensions if e in data), None)
    if extension is None:
        hint = _hint(reader, sample, field.extensions) or f"; {field.remedy}"
        raise BadSample(f"{reader.name(sample)} is of a sample without {field.described}{hint}")
    try:
        return field.read(data[extension], view)
    except BadSample as e:
        raise BadSample(f"{reader.name(sample, extension)} {e}") from None


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
    scaling: str = "bicubic",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples start..stop of a split in the manifest's order: uint8 (n, C, H, W), and labels int64 (n,), 0 without.

    upright: turned as their EXIF data say. scaling: as `data.scaling`.
    """
    reader = ShardReader(manifest, directory, cache)
    samples = range(start, stop)
    reader.prefetch(samples, (*IMAGE_FIELDS, LABEL_FIELD))
    images = torch.empty((len(samples), channels, image_size, image_size), dtype=torch.uint8)
    labels = torch.zeros(len(samples), dtype=torch.int64)
    picture, view = Picture("image", image_size, channels, upright), View(Crop(image_size, scaling))
    for row, sample in enumerate(samples):
        data = reader.read(sample, (*IMAGE_FIELDS, LABEL_FIELD))
        images[row] = torch.from_numpy(read_field(reader, sample, data, picture, view))
        if LABEL_FIELD in manifest.fields:
            labels[row] = int(read_field(reader, sample, data, ANY_LABEL, view))
    return images, labels


def read_pictures(
    manifest: Manifest,
    directory: str | Path,
    field: Picture,
    samples: Sequence[int],
    cache: BlockCache | None = None,
    scaling: str = "bicubic",
) -> torch.Tensor:
    """The picture `field` of these samples of a split, as they are cropped there: uint8 (n, C, S, S). Raises BadSample.

    scaling: as `data.scaling`.
    """
    reader, view = ShardReader(manifest, directory, cache), View(Crop(field.shape[1], scaling))
    reader.prefetch(sorted(set(samples)), field.extensions)
    found = {i: read_field(reader, i, reader.read(i, field.extensions), field, view) for i in set(samples)}
    return torch.from_numpy(np.stack([found[i] for i in samples]))


def read_moments(
    manifest: Manifest, directory: str | Path, shape: Sequence[int], start: int, stop: int
) -> torch.Tensor:
    """Moments float32 (n, 2, *shape) of samples start..stop of a latent cache, of the pictures as they are."""
    reader, samples, field = ShardReader(manifest, directory), range(start, stop), Moments("moments", shape)
    reader.prefetch(samples, field.extensions)
    rows = [read_field(reader, i, reader.read(i, field.extensions), field, NO_VIEW) for i in samples]
    return torch.from_numpy(np.stack(rows))


def label_of(reader: ShardReader, sample: int) -> int:
    """A sample's class number; no other file of it is read. Raises BadSample."""
    return int(read_field(reader, sample, reader.read(sample, (LABEL_FIELD,)), ANY_LABEL, NO_VIEW))


def read_captions(
    manifest: Manifest, directory: str | Path, field: Caption, cache: BlockCache | None = None
) -> list[str]:
    """The captions of a whole split in the manifest's order, of several the first. Raises BadSample."""
    reader, words = ShardReader(manifest, directory, cache), []
    for start in range(0, manifest.samples, _LABELS):
        samples = range(start, min(start + _LABELS, manifest.samples))
        reader.prefetch(samples, field.extensions)
        for sample in samples:
            data = reader.read(sample, field.extensions)
            try:
                words.append(field.words(data[field.extensions[0]]))
            except KeyError:
                raise BadSample(f"{reader.name(sample)} is of a sample without {field.described}") from None
            except BadSample as e:
                raise BadSample(f"{reader.name(sample, field.extensions[0])} {e}") from None
    return words


def read_labels(manifest: Manifest, directory: str | Path, cache: BlockCache | None = None) -> torch.Tensor:
    """The labels of a whole split in the manifest's order, int64 (N,), 0 without; no image is read."""
    if LABEL_FIELD not in manifest.fields:
        return torch.zeros(manifest.samples, dtype=torch.int64)
    reader = ShardReader(manifest, directory, cache)
    labels = []
    for start in range(0, manifest.samples, _LABELS):
        samples = range(start, min(start + _LABELS, manifest.samples))
        reader.prefetch(samples, (LABEL_FIELD,))
        labels += [label_of(reader, sample) for sample in samples]
    return torch.tensor(labels)
