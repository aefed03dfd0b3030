"""Writes a data set as WebDataset shards with manifests: DEST/train and, where samples are held out, DEST/holdout.

A packed folder is a pure function of the request, byte for byte; pack.json in it records the request.
"""

import hashlib
import io
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dtrain.data.indexing import index_shards
from dtrain.data.manifest import check_shards, load
from dtrain.data.shards import ShardReader
from dtrain.errors import UserError
from dtrain.randomness import Draws, Purpose, permutation

SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
FORMATS = {"png": ("png",), "jpeg": ("jpg", "jpeg"), "webp": ("webp",)}
REQUEST = "pack.json"


@dataclass(frozen=True)
class Source:
    """Labelled image files that can be packed.

    read(i): the i-th sample as field → bytes, `cls` included. content: hex digest that changes when the source does.
    """

    samples: int
    classes: list[str] | None
    content: str
    read: Callable[[int], dict[str, bytes]]


@dataclass(frozen=True)
class Packed:
    """What `pack` left at `destination`; prints as the line to show."""

    destination: Path
    train: int
    holdout: int
    kept: bool  # was there already

    def __str__(self) -> str:
        held = f" and {self.holdout:,} held out" if self.holdout else ""
        verb = "keeping what is there:" if self.kept else "packed"
        return f"{self.destination}: {verb} {self.train:,} samples for training{held}"


def pack(
    source: str,
    destination: str | Path,
    holdout: int = 0,
    seed: int = 0,
    shard_samples: int | None = None,
    shard_bytes: int | None = None,
    format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Pack `source` into `destination`: shuffled by `seed`, its first `holdout` samples kept apart.

    source: `sklearn:digits`; a folder of class folders of JPEG, PNG and WebP files, whose classes are numbered in the
    order of their names; an .npz with `images` uint8 (N, H, W[, C]) and `labels` (N,); or the manifest.json of other
    shards. Files are copied byte for byte, unless `format` (png, jpeg or webp; jpeg and webp with quality 95) asks for
    another; the pixels of an .npz become PNG. shard_samples: by default at most 1,000, and fewer so that each split has
    at least eight shards; shard_bytes ends a shard that has so many bytes. progress: called with (samples done, of).
    A destination packed before by the same request is kept; any other that is not
    empty is refused, UserError.
    """
    destination = Path(destination)
    data = _source(source)
    if not 0 <= holdout < data.samples:
        raise UserError(f"--holdout {holdout} must leave a sample to train on: {source} has {data.samples}")
    if format not in (None, *FORMATS):
        raise UserError(f"--format {format} is not one of {', '.join(FORMATS)}")
    if format is not None:
        data = replace(data, read=partial(_encoded, data, form=format))
    if shard_bytes is not None and shard_bytes < 1:
        raise UserError(f"a shard holds at least 1 byte, got {shard_bytes}")
    if shard_samples is not None and shard_samples < 1:
        raise UserError(f"a shard holds at least 1 sample, got {shard_samples}")
    request = {
        "source": source if source.startswith("sklearn:") else str(Path(source).resolve()),
        "content": data.content,
        "holdout": holdout,
        "seed": seed,
        "shard_samples": shard_samples,
        "shard_bytes": shard_bytes,
        "format": format,
    }
    packed = Packed(destination, data.samples - holdout, holdout, kept=False)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        _check_request(destination, request)
        for split in ("train", "holdout") if holdout else ("train",):
            check_shards(load(destination / split / "manifest.json"), destination / split)
        return Packed(**asdict(packed) | {"kept": True})

    shuffled = permutation(Draws(seed).words(Purpose.SPLIT, 0, size=data.samples))
    unfinished = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.partial")
    try:
        unfinished.mkdir(parents=True)
        for split, samples in (("holdout", shuffled[:holdout]), ("train", shuffled[holdout:])):
            if len(samples):
                report = _report(progress, 0 if split == "holdout" else holdout, data.samples)
                _write_split(data, samples, unfinished / split, split, shard_samples, shard_bytes, report)
        (unfinished / REQUEST).write_text(json.dumps(request, indent=1) + "\n")
        os.rename(unfinished, destination)
    except OSError as e:
        raise UserError(f"cannot pack {source} into {destination}: {e.strerror}; name a place with room") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already when all went well
    return packed


def _source(source: str) -> Source:
    if source == "sklearn:digits":
        return _digits()
    if source.endswith(".npz"):
        return _npz(Path(source))
    if source.endswith(".json"):
        return _shards(Path(source))
    return _class_folders(Path(source))


def _report(progress: Callable[[int, int], None] | None, before: int, of: int) -> Callable[[int], None]:
    """A function of the samples of one split done, that reports those of all splits."""
    return lambda done: progress(before + done, of) if progress else None


def _write_split(
    data: Source,
    samples: np.ndarray,
    folder: Path,
    split: str,
    shard_samples: int | None,
    shard_bytes: int | None,
    report: Callable[[int], None],
) -> None:
    """Shards `split-000000.tar`, … with manifest.json; keys are the samples' numbers in the source."""
    from webdataset import ShardWriter

    folder.mkdir()
    written: list[Path] = []

    def complete(name: str) -> None:
        written.append(Path(name))
        with open(name, "rb") as file:
            os.fsync(file.fileno())

    pattern = str((folder / split).absolute()).replace("%", "%%") + "-%06d.tar"
    count = shard_samples or min(1000, -(-len(samples) // 8))
    # A fixed time, and no encoder: fields are bytes as they shall be read.
    with ShardWriter(
        pattern, maxcount=count, maxsize=shard_bytes or 1e18, post=complete, verbose=0, mtime=0, encoder=False
    ) as writer:
        for done, i in enumerate(samples.tolist(), 1):
            writer.write({"__key__": f"{i:08d}"} | data.read(i))
            report(done)
    index_shards(written, folder / "manifest.json", classes=data.classes)


def _check_request(destination: Path, request: dict) -> None:
    """The folder was packed by the same request, or UserError with the first difference."""
    other = "name another destination, or remove it to pack anew"
    try:
        before = json.loads((destination / REQUEST).read_text())
        differing = [key for key in request if before.get(key) != request[key]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{destination} exists and was not made by `dtrain pack`; {other}") from None
    if differing == ["content"]:
        raise UserError(f"{destination} was packed from {request['source']} when that held other files; {other}")
    if differing:
        key = differing[0]
        raise UserError(f"{destination} was packed with {key} {before.get(key)!r}, not {request[key]!r}; {other}")


def _digits() -> Source:
    """scikit-learn's 1,797 scanned digits, 8×8, their levels 0..16 spread over 0..255, as grey PNG files."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)

    def read(i: int) -> dict[str, bytes]:
        png = io.BytesIO()
        Image.fromarray(levels[i]).save(png, "PNG")
        return {"png": png.getvalue(), "cls": str(digits.target[i]).encode()}

    content = hashlib.sha256(levels.tobytes() + digits.target.astype("<i8").tobytes()).hexdigest()
    return Source(len(levels), [str(name) for name in digits.target_names], content, read)


def _npz(path: Path) -> Source:
    """`images` uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), and `labels` (N,), zeros without."""
    from PIL import Image

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

    def read(i: int) -> dict[str, bytes]:
        png = io.BytesIO()
        Image.fromarray(images[i]).save(png, "PNG")
        return {"png": png.getvalue(), "cls": str(labels[i]).encode()}

    content = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    classes = [str(n) for n in range(int(labels.max(initial=0)) + 1)]
    return Source(len(images), classes, content, read)


def _shards(path: Path) -> Source:
    """All fields of other shards, beside their manifest."""
    manifest = load(path)
    reader = ShardReader(manifest, path.parent)
    return Source(manifest.samples, manifest.classes, manifest.hash, reader.read)


def _encoded(source: Source, i: int, form: str) -> dict[str, bytes]:
    """A sample with its image in another format; one that has it already stays as it is."""
    from PIL import Image

    sample = source.read(i)
    field = next((f for f in ("jpg", "jpeg", "png", "webp") if f in sample), None)
    if field is None or field in FORMATS[form]:
        return sample
    file = io.BytesIO()
    try:
        with Image.open(io.BytesIO(sample.pop(field))) as image:
            pixels = image if image.mode in ("L", "RGB") else image.convert("RGB")
            pixels.save(file, form.upper(), **({} if form == "png" else {"quality": 95}))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"sample {i} of the source cannot be decoded ({e}); leave it out") from None
    return {FORMATS[form][0]: file.getvalue()} | sample


def _class_folders(folder: Path) -> Source:
    """Every .jpg, .jpeg and .png below the folder's sub-folders; each of these is a class."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to pack; give a folder of class folders, or sklearn:digits")
    classes = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders; put the images of each class into a folder of its own")
    files: list[tuple[Path, int]] = []
    content = hashlib.sha256()
    for label, name in enumerate(classes):
        images = sorted(f for f in (folder / name).rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not images:
            raise UserError(f"the class folder {folder / name} has no .jpg, .jpeg or .png files; fill or remove it")
        for file in images:
            files.append((file, label))
            content.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\n".encode())

    def read(i: int) -> dict[str, bytes]:
        file, label = files[i]
        return {SUFFIXES[file.suffix.lower()]: file.read_bytes(), "cls": str(label).encode()}

    return Source(len(files), classes, content.hexdigest(), read)
