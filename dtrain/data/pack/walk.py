"""The pictures in a folder and below it, with everything in it that is none."""

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from dtrain.data.pack.left_out import LeftOut
from dtrain.errors import UserError

SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
_OTHER_FORMATS = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".jxl", ".svg", ".psd")
_MADE_BY_SYSTEMS = {"@eadir", "__macosx", "#recycle", "$recycle.bin"}  # thumbnails, shadows and bins


@dataclass(frozen=True)
class Walk:
    """pictures: (name relative to the folder with slashes, bytes), by folder and name."""

    pictures: list[tuple[str, int]]
    left_out: list[LeftOut]


def walk(root: Path) -> Walk:
    """Every .jpg, .jpeg, .png and .webp that is not hidden, by its name; what is inside is not looked at.

    Linked folders are followed, each real folder once, and none that lies around the root. Raises UserError for a
    folder that cannot be read.
    """
    pictures: list[tuple[str, int]] = []
    left_out: list[LeftOut] = []
    seen: set[tuple[int, int]] = set()
    around = {_identity(parent) for parent in Path(os.path.realpath(root)).parents}
    # Real folders first, so that a link to one of them is what is left out.
    real: deque[tuple[str, str | None]] = deque([("", None)])  # and why its pictures are left out
    links: deque[tuple[str, str | None]] = deque()
    while real or links:
        name, why = (real or links).popleft()
        identity = _identity(root / name)
        if identity in seen or identity in around:
            if why is None:
                elsewhere = "taken elsewhere" if identity in seen else "around the source"
                left_out.append(LeftOut(name.rstrip("/"), "linked folder", elsewhere))
            continue
        seen.add(identity)
        for entry in _entries(root / name):
            inner = name + entry.name
            if entry.is_dir():
                target = links if entry.is_symlink() else real
                target.append((inner + "/", why or _why_not(entry.name, "folder")))
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            hidden = why or _why_not(entry.name, "file")
            if hidden is None and suffix in SUFFIXES and entry.is_file():
                pictures.append((inner, entry.stat().st_size))
            elif suffix in SUFFIXES:
                broken = "broken link" if entry.is_symlink() else "no file"
                left_out.append(LeftOut.file(inner, hidden if entry.is_file() else broken))
            elif why is None:  # what else lies in hidden folders nobody expects to be packed
                other = suffix in _OTHER_FORMATS
                left_out.append(LeftOut.file(inner, "not JPEG, PNG or WebP; convert it" if other else "no picture"))
    pictures.sort(key=lambda picture: picture[0].split("/"))
    left_out.sort(key=lambda one: one.name.split("/"))
    return Walk(pictures, left_out)


def folders_in(folder: Path) -> list[str]:
    """Names of the sub-folders that are not hidden, sorted."""
    return [entry.name for entry in _entries(folder) if entry.is_dir() and _why_not(entry.name, "folder") is None]


def files_below(folder: Path, suffix: str, depth: int) -> list[str]:
    """Names, relative to the folder, of visible files with this suffix at most so many folders below, sorted.

    A folder with pictures is not looked into further.
    """
    found, level = [], [""]
    for _ in range(depth + 1):
        below = []
        for name in level:
            entries = [e for e in _entries(folder / name) if _why_not(e.name, "file") is None]
            if any(os.path.splitext(e.name)[1].lower() in SUFFIXES for e in entries):
                continue
            found += [name + e.name for e in entries if e.name.endswith(suffix) and e.is_file()]
            below += [name + e.name + "/" for e in entries if e.is_dir()]
        level = below
    return sorted(found)


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as e:
        raise UserError(f"cannot read the folder {folder}: {e.strerror}; ask its owner, or take it out") from None


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _why_not(name: str, what: str) -> str | None:
    if name.lower() in _MADE_BY_SYSTEMS:
        return f"in {name}"
    return f"hidden {what}" if name.startswith(".") else None
