"""Where the pieces of a checkpoint lie: each rank's index, and what the manifest says of all of them in few numbers.

At stage 3 a thousand ranks have a piece of every tensor, and their indexes together some 100 MB. But pieces that follow
each other are equally long, so the manifest keeps them as runs [first rank, ranks, start, length]: ranks first, …, hold
`length` elements each, one after the other from element `start` of the flat tensor. A reader learns from the runs which
ranks hold what it wants, and reads their indexes alone.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.checkpoint.directory import LARGEST
from dtrain.files import parse_json, read_bytes

MOST_RUNS = 100_000  # that a manifest keeps; a checkpoint cut into more has its indexes alone
NAME = re.compile(r"rank-[0-9]{5,9}\.json")

Runs = dict[str, list[list[int]]]  # tensor → [first rank, ranks, start, length]


class Damaged(Exception):
    """A checkpoint is incomplete or its bytes are not those that were written. The message names file and place."""


def file_stem(rank: int) -> str:
    return f"rank-{rank:05d}"


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


@dataclass(frozen=True)
class Index:
    """One rank's: its file's bytes, their checksums a block, and its pieces.

    rows: tensor → numbers of its pieces; alike in ranks that hold the same tensors, which then share it. pieces: (P, 3)
    int64 of first element, elements, byte offset.
    """

    size: int
    block: int
    checksums: list[int]
    rows: dict[str, list[int]]
    pieces: np.ndarray

    def of(self, name: str) -> list[list[int]]:
        """[first element, elements, byte offset] of each piece of a tensor that the rank holds."""
        return [self.pieces[row].tolist() for row in self.rows.get(name, ())]

    def ranges(self) -> Iterator[tuple[str, int, int]]:
        """(tensor, first element, elements) of all pieces that are not empty."""
        listed = self.pieces.tolist()
        for name, rows in self.rows.items():
            yield from ((name, start, length) for start, length, _ in (listed[row] for row in rows) if length)


class Indexes:
    """The indexes of a checkpoint's ranks, read when they are asked for and then kept.

    digests: file name → sha256, as the manifest has them, in the order of ranks.
    """

    def __init__(self, folder: Path, digests: dict[str, str]):
        self._folder = folder
        self._digests = list(digests.items())
        self._kept: dict[int, Index] = {}
        self._rows: dict[tuple[str, ...], dict[str, list[int]]] = {}

    def __len__(self) -> int:
        return len(self._digests)

    def data_file(self, rank: int) -> Path:
        return self._folder / f"{Path(self._digests[rank][0]).stem}.safetensors"

    def __getitem__(self, rank: int) -> Index:
        """Raises OSError and Damaged."""
        if rank not in self._kept:
            self._kept[rank] = self._read(*self._digests[rank])
        return self._kept[rank]

    def _read(self, name: str, digest: str) -> Index:
        place = self._folder / name
        data = read_bytes(place, LARGEST, follow=False)
        if hashlib.sha256(data).hexdigest() != digest:
            raise Damaged(f"{place} is not the index that was written with this checkpoint")
        try:
            found = parse_json(data, most_depth=None)
            size, block, checksums, listed = (found[key] for key in ("bytes", "block", "crc32", "pieces"))
            names, *columns = zip(*listed, strict=True) if listed else ((),) * 4
            pieces = np.stack([np.array(column, None if listed else np.int64) for column in columns], axis=1)
            formed = (
                found["file"] == f"{Path(name).stem}.safetensors"
                and is_count(size)
                and is_count(block)
                and block > 0
                and len(checksums) == -(-size // block)
                and all(map(is_count, checksums))
                and {str}.issuperset(map(type, names))
                and pieces.dtype == np.int64
                and pieces.shape == (len(names), 3)
                and not (pieces < 0).any()
            )
        except (ValueError, KeyError, TypeError, IndexError, OverflowError):
            formed = False
        if not formed:
            raise Damaged(f"{place} has not the form of a rank's index")
        _check_places(place, size, names, pieces)
        if names not in self._rows:
            rows = self._rows[names] = defaultdict(list)
            for row, tensor in enumerate(names):
                rows[tensor].append(row)
        return Index(size, block, checksums, self._rows[names], pieces)


def _check_places(place: Path, size: int, names: tuple[str, ...], pieces: np.ndarray) -> None:
    """Raises Damaged where a piece lies over another one, or over the end of the file."""
    order = np.argsort(pieces[:, 2], kind="stable")
    _, length, offset = np.minimum(pieces, size + 1)[order].T  # such large numbers would not fit when they are added
    end = np.concatenate([[0], offset + 4 * length])
    wrong = np.flatnonzero((offset < end[:-1]) | (end[1:] > size))
    if wrong.size:
        name = names[order[wrong[0]]]
        raise Damaged(f"{place} places {name} where it cannot be in a file of {size:,} bytes")


def runs_of(ranks: Iterable[Index]) -> Runs:
    """The pieces of all ranks, in their order, as runs."""
    found: Runs = defaultdict(list)
    for _, alike in groupby(enumerate(ranks), key=lambda item: id(item[1].rows)):
        numbers, indexes = zip(*alike, strict=True)
        start, length, _ = np.stack([index.pieces for index in indexes]).transpose(2, 0, 1)  # (ranks, pieces)
        begins = np.ones(start.shape, bool)
        begins[1:] = (length[1:] != length[:-1]) | (start[1:] != start[:-1] + length[:-1])
        for name, rows in indexes[0].rows.items():
            for row in rows:
                at = np.flatnonzero(begins[:, row])
                ranks_of_run = np.diff(at, append=len(indexes))
                columns = numbers[0] + at, ranks_of_run, start[at, row], length[at, row]
                found[name] += [run for run in np.stack(columns, axis=1).tolist() if run[3]]
    return dict(found)


def pieces_of(runs: Runs, rank: int) -> list[tuple[str, int, int]]:
    """(tensor, first element, elements) of each piece that a rank holds, by name and element."""
    return sorted(
        (name, start + (rank - first) * length, length)
        for name, some in runs.items()
        for first, count, start, length in some
        if first <= rank < first + count
    )


def holders(runs: list[list[int]], start: int, stop: int) -> Iterator[range]:
    """The ranks that hold elements [start, stop) of a tensor, or some of them, by its runs; start < stop."""
    for first, count, begin, length in runs:
        low, high = max(start, begin), min(stop, begin + count * length)
        if low < high:
            yield range(first + (low - begin) // length, first + (high - 1 - begin) // length + 1)


def plan(copies: dict[int, list], block: int, piece: list[int], start: int, stop: int, out: np.ndarray) -> None:
    """Note in `copies`, block → (first byte in it, destination), where a file has of elements [start, stop) for `out`
    what the piece [first element, elements, byte offset] holds.
    """
    begin, length, offset = piece
    first, last = max(start, begin), min(stop, begin + length)
    if first >= last:
        return
    target = out[first - start : last - start].view(np.uint8)
    at, end = offset + 4 * (first - begin), offset + 4 * (last - begin)
    for number in range(at // block, (end - 1) // block + 1):
        low, high = max(at, number * block), min(end, (number + 1) * block)
        copies[number].append((low - number * block, target[low - at : high - at]))


def check_covered(path: Path, runs: Runs, tensors: dict[str, int]) -> None:
    """Raises Damaged where no rank holds some elements of a tensor."""
    for name, elements in tensors.items():
        covered = 0
        for _, count, start, length in sorted(runs.get(name, ()), key=lambda run: run[2]):
            if start > covered:
                break
            covered = max(covered, start + count * length)
        if covered < elements:
            raise Damaged(f"{path}: elements {covered:,}… of {name} are missing")


def are_runs(found: Any, ranks: int) -> bool:
    """Whether they have the form of `runs_of`, for so many ranks."""
    return isinstance(found, dict) and all(
        isinstance(runs, list)
        and all(
            isinstance(run, list) and len(run) == 4 and all(map(is_count, run)) and run[1] > 0 and run[3] > 0
            for run in runs
        )
        and all(run[0] + run[1] <= ranks for run in runs)
        for runs in found.values()
    )
