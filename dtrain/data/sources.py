"""What `dtrain pack` packs: labelled images from folders, .npz files, other shards and scikit-learn.

Each source hands out small items in its own process, which a worker process turns into a sample's files.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.data.manifest import load
from dtrain.data.shards import ShardReader
from dtrain.errors import UserError

SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
FORMATS = {"png": ("png",), "jpeg": ("jpg", "jpeg"), "webp": ("webp",)}

Files = dict[str, bytes]  # of one sample by field, `cls` included


@dataclass(frozen=True)
class Source:
    """Labelled image files that can be packed.

    item(i): what `files` needs of the i-th sample; both it and `files` can go to another process.
    content: hex digest that changes when the source does.
    """

    samples: int
    classes: list[str] | None
    content: str
    item: Callable[[int], Any]
    files: Callable[[Any], Files]

    def in_format(self, form: str) -> "Source":
        """The same with images in another format; one that has it already stays as it is."""
        return replace(self, item=lambda i: (i, self.item(i)), files=partial(_encoded, self.files, form))


def open_source(source: str) -> Source:
    """`sklearn:digits`, a folder of class folders, an .npz, or the manifest.json of other shards. Raises UserError."""
    if source == "sklearn:digits":
        return _digits()
    if source.endswith(".npz"):
        return _npz(Path(source))
    if source.endswith(".json"):
        return _shards(Path(source))
    return _class_folders(Path(source))


def _digits() -> Source:
    """scikit-learn's 1,797 scanned digits, 8×8, their levels 0..16 spread over 0..255, as grey PNG files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    content = hashlib.sha256(levels.tobytes() + digits.target.astype("<i8").tobytes()).hexdigest()
    classes = [str(name) for name in digits.target_names]
    return Source(len(levels), classes, content, lambda i: (levels[i], int(digits.target[i])), _png)


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

    content = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    classes = [str(n) for n in range(int(labels.max(initial=0)) + 1)]
    return Source(len(images), classes, content, lambda i: (images[i], int(labels[i])), _png)


def _png(item: tuple[np.ndarray, int]) -> Files:
    from PIL import Image

    pixels, label = item
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"png": file.getvalue(), "cls": str(label).encode()}


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


def _encoded(files: Callable[[Any], Files], form: str, item: tuple[int, Any]) -> Files:
    from PIL import Image

    i, own = item
    sample = files(own)
    field = next((f for f in ("jpg", "jpeg", "png", "webp") if f in sample), None)
    if field is None or field in FORMATS[form]:
        return sample
    file = io.BytesIO()
    try:
        with Image.open(io.BytesIO(sample.pop(field))) as image:
            if image.mode[0] in "IF":
                raise ValueError("it has more than 8 bits a channel")
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError("it is animated; only still images can be used")
            pixels = image if image.mode in ("L", "RGB") else image.convert("RGB")
            pixels.save(file, form.upper(), **({} if form == "png" else {"quality": 95}))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"sample {i} of the source cannot be decoded ({e}); leave it out") from None
    return {FORMATS[form][0]: file.getvalue()} | sample


MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")  # what files of the three formats begin with


def _class_folders(folder: Path) -> Source:
    """Every .jpg, .jpeg, .png and .webp below the folder's sub-folders; each of these is a class."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to pack; give a folder of class folders, or sklearn:digits")
    classes = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders; put the images of each class into a folder of its own")
    if unreadable := [name for name in classes if not name.isprintable()]:
        raise UserError(f"the class folder {unreadable[0]!r} has a name that cannot be kept; rename it")
    files: list[tuple[Path, int]] = []
    content = hashlib.sha256()
    for label, name in enumerate(classes):
        images = sorted(f for f in (folder / name).rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not images:
            raise UserError(
                f"the class folder {folder / name} has no .jpg, .jpeg, .png or .webp files; fill or remove it"
            )
        for file in images:
            files.append((file, label))
            content.update(os.fsencode(f"{file.relative_to(folder)}\0{file.stat().st_size}\n"))

    return Source(len(files), classes, content.hexdigest(), files.__getitem__, _file)


def _file(item: tuple[Path, int]) -> Files:
    path, label = item
    data = path.read_bytes()
    if not data.startswith(MAGIC) or (data.startswith(b"RIFF") and data[8:12] != b"WEBP"):
        raise UserError(f"{path} is no JPEG, PNG or WebP image; take it out of the folder")
    return {SUFFIXES[path.suffix.lower()]: data, "cls": str(label).encode()}
