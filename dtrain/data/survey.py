"""A glance at a data set: what the headers of a few of its pictures say. Imports no torch and no NumPy."""

import os
import struct
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from dtrain.data.exif import AS_STORED
from dtrain.data.fields import IMAGE_FIELDS
from dtrain.data.headers import Header, header
from dtrain.data.manifest import RECORD_BYTES, Manifest
from dtrain.data.remote import is_url
from dtrain.errors import BadSample
from dtrain.files import opener

LOOKED_AT = 64  # pictures
_MEMBER = struct.Struct("<QII")  # a record of the side file: offset, size, crc32
_ABSENT = 0xFFFFFFFF
_FIRST = 1 << 16  # bytes of a picture that are read first; a photograph's header may begin with a thumbnail
_SHOWN = 6  # classes that are named


@dataclass(frozen=True)
class Survey:
    """The pictures whose headers could be read, among some that are spread evenly over the data set."""

    headers: list[Header]

    @property
    def shorter_sides(self) -> list[int]:
        """Of each picture, in pixels, sorted."""
        return sorted(min(one.width, one.height) for one in self.headers)

    @property
    def grey(self) -> bool:
        """Whether none has colours."""
        return bool(self.headers) and all(one.grey for one in self.headers)

    @property
    def turned(self) -> int:
        """How many say by their EXIF data that they are stored turned or mirrored."""
        return sum(one.orientation != AS_STORED for one in self.headers)

    def scaling(self, image_size: int) -> str | None:
        """A line about what is not of this size already; None where all are."""
        sides, seen = self.shorter_sides, len(self.headers)
        smaller, larger = [s for s in sides if s < image_size], [s for s in sides if s > image_size]
        parts = []
        if smaller:
            parts.append(f"{_all(smaller, seen)} enlarged to {image_size} (shorter sides {_range(smaller)} pixels)")
        if larger:
            parts.append(f"{_all(larger, seen)} shrunk to {image_size} (shorter sides {_range(larger)} pixels)")
        return f"of {seen} images looked at, {' and '.join(parts)}" if parts else None


def survey(manifest: Manifest, directory: str | Path, count: int = LOOKED_AT) -> Survey:
    """Read the headers of `count` pictures of a local data set; of a remote one, none."""
    headers = []
    if not is_url(directory):
        with open(manifest.side, "rb", opener=opener) as side:
            for i in range(min(count, manifest.samples)):
                found = _header(manifest, Path(directory), side, i * manifest.samples // min(count, manifest.samples))
                headers += [found] if found else []
    return Survey(headers)


def named(classes: list[str]) -> str:
    """`3 classes: 0 cat, 1 dog, 2 owl`, the middle left out where there are many."""
    if classes == [str(n) for n in range(len(classes))]:
        return f"{len(classes):,} classes, called by their numbers"
    numbered = [f"{n} {_printable(name)}" for n, name in enumerate(classes)]
    if len(numbered) > _SHOWN:
        numbered[_SHOWN - 1 : -1] = ["…"]
    return f"{len(classes):,} classes: {', '.join(numbered)}"


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)


def _header(manifest: Manifest, directory: Path, side, sample: int) -> Header | None:
    ends = list(accumulate(shard.samples for shard in manifest.shards))
    shard = manifest.shards[bisect_right(ends, sample)]
    side.seek(sample * len(manifest.fields) * RECORD_BYTES)
    members = dict(
        zip(manifest.fields, _MEMBER.iter_unpack(side.read(len(manifest.fields) * RECORD_BYTES)), strict=True)
    )
    field = next((f for f in IMAGE_FIELDS if f in members and members[f][1] != _ABSENT), None)
    if field is None:
        return None
    offset, size, _ = members[field]
    if offset + size > shard.bytes:
        return None
    try:
        with open(directory / shard.name, "rb", opener=opener) as file:
            for length in {min(size, _FIRST): None, size: None}:
                with suppress(BadSample):
                    return header(os.pread(file.fileno(), length, offset))
    except OSError:
        pass
    return None  # a glance passes over what reading will refuse by its name


def _all(some: list[int], seen: int) -> str:
    return f"{'all' if len(some) == seen else len(some)} {'is' if len(some) == 1 < seen else 'are'}"


def _range(sides: list[int]) -> str:
    return f"{sides[0]:,}" if sides[0] == sides[-1] else f"{sides[0]:,} to {sides[-1]:,}"
