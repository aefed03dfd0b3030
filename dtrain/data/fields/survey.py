"""A glance at a data set: what the headers of a few of its pictures say. Imports no torch and no NumPy."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dtrain.data.fields.exif import AS_STORED
from dtrain.data.fields.headers import Header, header
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.members import Members, evenly, open_members
from dtrain.data.shards.remote import is_url
from dtrain.data.shards.sample_files import IMAGE_FIELDS
from dtrain.errors import BadSample

LOOKED_AT = 64  # pictures
_FIRST = 1 << 16  # bytes of a picture that are read first; a photograph's header may begin with a thumbnail
_SHOWN = 6  # classes that are named


@dataclass(frozen=True)
class Survey:
    """The pictures whose headers could be read, among some that are spread evenly over the data set."""

    headers: list[Header]

    @property
    def shorter_sides(self) -> list[int]:
        """The shorter side of each picture, in pixels, sorted."""
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
        with open_members(manifest, directory) as members:
            headers = [found for sample in evenly(manifest, count) if (found := _header(members, sample))]
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


def _header(members: Members, sample: int) -> Header | None:
    found = members.of(sample)
    field = next((f for f in IMAGE_FIELDS if f in found), None)
    if field is None:
        return None
    offset, size = found[field]
    try:
        for length in {min(size, _FIRST): None, size: None}:
            with suppress(BadSample):
                return header(members.read(sample, offset, length))
    except OSError:
        pass
    return None  # a glance passes over what reading will refuse by its name


def _all(some: list[int], seen: int) -> str:
    return f"{'all' if len(some) == seen else len(some)} {'is' if len(some) == 1 < seen else 'are'}"


def _range(sides: list[int]) -> str:
    return f"{sides[0]:,}" if sides[0] == sides[-1] else f"{sides[0]:,} to {sides[-1]:,}"
