"""Samples that a training could not use: without a picture, a label or an array, or with a label that is no class.

Without this a training meets them at a random step. The side file says which fields every sample has, so all are
counted; labels stand in the shards, so indexing reads them all and a check some. Imports no torch and no NumPy.
"""

from array import array
from dataclasses import dataclass
from pathlib import Path

from dtrain.data.shards.manifest import ABSENT, RECORD_BYTES, Manifest
from dtrain.data.shards.members import evenly, open_members
from dtrain.data.shards.remote import is_url
from dtrain.data.shards.sample_files import DOT_RULE, LABEL_FIELD, class_number, dotted
from dtrain.files import opener
from dtrain.terminal import printable

_PIECE = 1 << 22  # bytes of the side file read at a time
_WORDS = RECORD_BYTES // 4  # of a record, the third of which is the size
_LONGEST = 64  # bytes of a label that are read


@dataclass(frozen=True)
class Lack:
    """count of the `of` samples that were looked at lack something; what says which, and names the first."""

    count: int
    of: int
    what: str

    def __str__(self) -> str:
        return printable(self.what)  # names of members are as foreign as the shards


def lacking(manifest: Manifest, directory: str | Path, wanted: list[tuple[str, ...]]) -> list[Lack]:
    """What is missing of each of `wanted`, fields of which a sample needs one, so far as any sample has it."""
    columns = [[manifest.fields.index(f) for f in group if f in manifest.fields] for group in wanted]
    counts, first = _absent(manifest, columns)
    found = []
    for group, own, count, sample in zip(wanted, columns, counts, first, strict=True):
        if own and count:
            names = " or ".join(manifest.fields[column] for column in own)
            name, hint = _name(manifest, directory, sample), ""
            with open_members(manifest, directory) as members:
                if other := dotted(members.of(sample), group):
                    hint = f", which has `{other}` instead: {DOT_RULE}"
            there = manifest.samples - count
            what = f"{names} in {there:,} of {manifest.samples:,} samples; first without: {name}{hint}"
            found.append(Lack(count, manifest.samples, what))
    return found


def _absent(manifest: Manifest, columns: list[list[int]]) -> tuple[list[int], list[int]]:
    """(how many samples have none of a group's columns, the first such sample or −1), a value for each group."""
    width = len(manifest.fields)
    counts, first = [0] * len(columns), [-1] * len(columns)
    if manifest.complete:
        return counts, first
    rows = max(1, _PIECE // (width * RECORD_BYTES))
    with open(manifest.side, "rb", opener=opener) as side:
        for start in range(0, manifest.samples, rows):
            piece = side.read(rows * width * RECORD_BYTES)
            if b"\xff\xff\xff\xff" not in piece:
                continue
            words = array("I", piece)
            for group, own in enumerate(columns):
                sizes = [words[_WORDS * column + 2 :: _WORDS * width] for column in own]
                if not sizes:
                    continue
                least = sizes[0] if len(sizes) == 1 else list(map(min, *sizes))  # ABSENT is the largest number
                if missing := least.count(ABSENT):
                    counts[group] += missing
                    if first[group] < 0:
                        first[group] = start + least.index(ABSENT)
    return counts, first


def wrong_labels(manifest: Manifest, directory: str | Path, num_classes: int, most: int | None = None) -> Lack | None:
    """Labels that are no number below `num_classes` (0: any number), among `most` samples of a local data set, or all.

    What cannot be read or is damaged is passed over: whoever reads the shard for its pictures names it.
    """
    if LABEL_FIELD not in manifest.fields or is_url(directory):
        return None
    samples = range(manifest.samples) if most is None else evenly(manifest, most)
    count, first = 0, None
    with open_members(manifest, directory) as members:
        for sample in samples:
            try:
                text = members.head(sample, LABEL_FIELD, _LONGEST)
            except (KeyError, OSError):
                continue
            number = class_number(text)
            if number is None or (num_classes and number >= num_classes):
                count, first = count + 1, first or (sample, text)
    if first is None:
        return None
    name = _name(manifest, directory, first[0], LABEL_FIELD)
    return Lack(count, len(samples), of_labels(count, len(samples), manifest.samples, num_classes, name, first[1]))


def of_labels(count: int, seen: int, samples: int, num_classes: int, name: str, text: bytes) -> str:
    """The words for wrong labels, the first of which is the member `name` and holds `text`."""
    known = f"model.num_classes is {num_classes}, so labels go from 0 to {num_classes - 1}, but " if num_classes else ""
    kind = "none of these" if num_classes else "no class number"
    among = f"{seen:,} samples" if seen == samples else f"{seen:,} samples looked at"
    shown, number = text[:20].decode("ascii", "backslashreplace"), class_number(text)
    needs = "" if number is None else f", which needs model.num_classes {number + 1} or more"
    return f"{known}{LABEL_FIELD} is {kind} in {count:,} of {among}; first: {name} holds {shown!r}{needs}"


def _name(manifest: Manifest, directory: str | Path, sample: int, field: str | None = None) -> str:
    from dtrain.data.shards.reader import ShardReader  # with NumPy: only to name what is wrong

    return ShardReader(manifest, directory).name(sample, field)
