"""What `dtrain pack` packs: images from folders, Parquet and .npz files, other shards, scikit-learn and torchvision."""

import zipfile
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from dtrain.data.pack.digit_pairs import digit_pairs
from dtrain.data.pack.fitness import Files
from dtrain.data.pack.folders import folder
from dtrain.data.pack.parquet import parquet
from dtrain.data.pack.source import Choice, Source, arrays, by_class
from dtrain.data.pack.torchvision_sets import torchvision_set
from dtrain.data.shards.manifest import load
from dtrain.data.shards.reader import ShardReader
from dtrain.errors import UserError


def open_source(source: str, choice: Choice | None = None) -> Source:
    """Each form of FORMS. Raises UserError, also for a choice that the source does not have."""
    choice = choice or Choice()
    if choice.caption_template and (choice.captions or choice.caption_column):
        raise UserError("--caption-template makes captions; leave --captions and --caption-column away")
    own = _opened(source, replace(choice, caption_template=None, class_names=None))
    return by_class(own, choice.class_names, choice.caption_template)


def _opened(source: str, choice: Choice) -> Source:
    path = Path(source)
    if source.startswith("torchvision:"):
        choice.only(source, "split", "root", "download")
        return torchvision_set(source.removeprefix("torchvision:"), choice)
    if source == "sklearn:digits":
        choice.only(source)
        return _digits()
    if source == "sklearn:digit-pairs":
        choice.only(source, "split")
        return digit_pairs(choice)
    if source.endswith(".npz"):
        choice.only(source)
        return _npz(path)
    if source.endswith(".json"):
        choice.only(source)
        return _shards(path)
    if source.endswith(".parquet"):
        choice.only(source, "split", "label_column", "image_column")
        return parquet(path, choice)
    return folder(path, choice)


def _digits() -> Source:
    """scikit-learn's 1,797 scanned digits, 8×8, their levels 0..16 spread over 0..255, as grey PNG files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    return arrays(levels, digits.target, [str(name) for name in digits.target_names])


def _npz(path: Path) -> Source:
    """`images` uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), and `labels` (N,), zeros without."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["images"]
            labels = file["labels"] if "labels" in file else np.zeros(len(images), np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is no .npz with `images` that can be read ({e}); see `dtrain sample --out`") from None
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise UserError(f"{path}: `images` is {images.dtype} {images.shape}, not uint8 (N, H, W), or (N, H, W, 3)")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise UserError(f"{path}: `labels` must be {len(images)} class numbers, one an image")
    return arrays(images, labels, [str(n) for n in range(int(labels.max(initial=0)) + 1)])


def _shards(path: Path) -> Source:
    """All fields of other shards, beside their manifest."""
    manifest = load(path)
    return Source(manifest.samples, manifest.classes, manifest.hash, lambda i: i, partial(_of_shards, path))


def _of_shards(path: Path, i: int) -> Files:
    return _reader(path).read(i)


@lru_cache(maxsize=1)
def _reader(path: Path) -> ShardReader:
    """One a process."""
    return ShardReader(load(path), path.parent)
