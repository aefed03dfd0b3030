"""The checkpoint on disk: pieces of flat global tensors, one safetensors file and one JSON index a rank.

    step-00001000/
        manifest.json            what is in it, and which ranks hold it; names every index with its hash
        rank-00000.safetensors   this rank's pieces
        rank-00000.json          where each piece lies, and a checksum of every block of the file

A tensor is flat and named "<parameter>:<fp32 | exp_avg | exp_avg_sq | ema_i>". A piece is (name, start, length).
Nothing here knows a world size or a ZeRO stage: a reader asks for any slice and gets it from whichever files hold it.
Nothing is pickled, so reading runs no code; every byte is checked before it is used.
"""

import hashlib
import itertools
import json
import os
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dtrain import faults
from dtrain.checkpoint.directory import LARGEST
from dtrain.checkpoint.index import (
    MOST_RUNS,
    NAME,
    Damaged,
    Index,
    Indexes,
    Runs,
    are_runs,
    check_covered,
    file_stem,
    holders,
    is_count,
    pieces_of,
    plan,
    runs_of,
)
from dtrain.files import open_regular, read_json

FORMAT = 1
BLOCK = 16 * 2**20  # bytes under one checksum
_PIECES = b'"pieces":'  # where they begin in an index, which has them last


@dataclass(frozen=True)
class Slot:
    """Where one piece lies in a rank's file."""

    name: str
    start: int  # first element within the flattened tensor
    length: int  # elements, fp32
    offset: int  # byte offset within the file


@dataclass(frozen=True)
class Layout:
    """One rank's file: header bytes, slots, total size."""

    header: bytes
    slots: tuple[Slot, ...]
    size: int


def layout(pieces: Iterable[tuple[str, int, int]]) -> Layout:
    """The safetensors file that holds fp32 pieces (name, start, length), in the order given."""
    entries, at = {}, 0
    pieces = list(pieces)
    for name, start, length in pieces:
        entries[f"{name}@{start}"] = {"dtype": "F32", "shape": [length], "data_offsets": [at, at + 4 * length]}
        at += 4 * length
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # data aligned to 64 bytes
    header = len(text).to_bytes(8, "little") + text
    slots, at = [], len(header)
    for name, start, length in pieces:
        slots.append(Slot(name, start, length, at))
        at += 4 * length
    return Layout(header, tuple(slots), at)


def write_file(
    directory: Path, rank: int, layout: Layout, image: memoryview, on_block: Callable[[float], None]
) -> None:
    """Write the file whose bytes are `image` and its index, both fsynced.

    on_block: called after every block with the seconds it took; it may wait, so that others get the processor.
    """
    stem = file_stem(rank)
    checksums = []
    with open(directory / f"{stem}.safetensors", "wb", buffering=0) as f:
        for at in range(0, layout.size, BLOCK):
            started = time.perf_counter()
            block = image[at : min(at + BLOCK, layout.size)]
            checksums.append(zlib.crc32(block))
            for part in (block[: len(block) // 2], block[len(block) // 2 :]):
                while part:
                    part = part[f.write(part) :]
                faults.at("save:write")
            on_block(time.perf_counter() - started)
        faults.at("save:fsync")
        os.fsync(f.fileno())
    faults.at("save:index")
    index = {
        "format": FORMAT,
        "file": f"{stem}.safetensors",
        "bytes": layout.size,
        "block": BLOCK,
        "crc32": checksums,
        "pieces": [[s.name, s.start, s.length, s.offset] for s in layout.slots],
    }
    write_durably(directory / f"{stem}.json", json.dumps(index, separators=(",", ":")).encode())


def write_durably(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    faults.at("save:rename")
    os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass
class Summary:
    """What a manifest says of all indexes together, kept from one commit to the next: a run's pieces seldom change.

    pieces: a hash of what the indexes say of pieces. runs: None where they are too many to be kept.
    """

    pieces: str = ""
    runs: Runs | None = None
    sizes: list[int] = field(default_factory=list)  # bytes of each rank's file


def write_manifest(
    directory: Path, world_size: int, tensors: dict[str, int], meta: dict[str, Any], summary: Summary
) -> None:
    """The last file of a checkpoint. `summary` is brought up to date. Raises Damaged when a rank's index is missing."""
    digests, pieces = {}, hashlib.sha256()
    try:
        for rank in range(world_size):
            data = (directory / f"{file_stem(rank)}.json").read_bytes()
            digests[f"{file_stem(rank)}.json"] = hashlib.sha256(data).hexdigest()
            pieces.update(data[data.rindex(_PIECES) :])
        if summary.pieces != pieces.hexdigest():
            indexes = Indexes(directory, digests)
            runs = runs_of(map(indexes.__getitem__, range(world_size)))
            summary.sizes = [indexes[rank].size for rank in range(world_size)]
            summary.runs = runs if sum(map(len, runs.values())) <= MOST_RUNS else None
            summary.pieces = pieces.hexdigest()
    except OSError as e:
        raise Damaged(f"{e.filename}: {e.strerror}") from None
    body = {"format": FORMAT, "indexes": digests, "tensors": tensors, "meta": meta}
    if summary.runs is not None:
        body |= {"ranges": summary.runs, "bytes": summary.sizes}
    write_durably(directory / "manifest.json", json.dumps({"sha256": _hash(body), **body}, indent=1).encode())


def _hash(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, of the form that `write_manifest` gives it. Raises OSError and Damaged."""
    place = path / "manifest.json"
    try:
        found = read_json(place, LARGEST, follow=False)
    except ValueError as e:
        raise Damaged(f"{place} cannot be read ({e})") from None
    if not isinstance(found, dict) or found.pop("sha256", None) != _hash(found):
        raise Damaged(f"{place} is not as it was written")
    if found.get("format") != FORMAT:
        raise Damaged(f"{path} has format {found.get('format')}; this version reads format {FORMAT}")
    indexes, tensors, meta = (found.get(key) for key in ("indexes", "tensors", "meta"))
    if not (
        isinstance(indexes, dict)
        and all(NAME.fullmatch(name) and isinstance(d, str) for name, d in indexes.items())
        and isinstance(tensors, dict)
        and all(map(is_count, tensors.values()))
        and isinstance(meta, dict)
        and all(is_count(meta.get(key, 0)) for key in ("step", "images", "optimizer_steps"))
        and ("ranges" not in found or _is_summary(found, len(indexes)))
    ):
        raise Damaged(f"{place} has not the form of a checkpoint's manifest")
    return found


def _is_summary(manifest: dict[str, Any], ranks: int) -> bool:
    """Whether what it says of all indexes together has the form that `write_manifest` gives it."""
    sizes = manifest.get("bytes")
    return (
        list(manifest["indexes"]) == [f"{file_stem(rank)}.json" for rank in range(ranks)]
        and isinstance(sizes, list)
        and len(sizes) == ranks
        and all(map(is_count, sizes))
        and are_runs(manifest["ranges"], ranks)
    )


def _check_sizes(path: Path, tensors: dict[str, int]) -> None:
    """Raises Damaged where moments or averages of a parameter have not as many elements as its weights."""
    for name, size in tensors.items():
        weights = tensors.get(f"{name.rpartition(':')[0]}:fp32", size)
        if weights != size:
            raise Damaged(f"{path}: {name} has {size:,} elements, its weights {weights:,}")


@dataclass
class Checkpoint:
    """A complete checkpoint, open for reading."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, int]  # name → elements
    _indexes: Indexes = field(repr=False)
    _sizes: list[int] = field(repr=False)  # bytes of each rank's file
    _runs: Runs = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, all_files: bool = True) -> "Checkpoint":
        """Read the manifest, checking that the pieces cover every tensor; of an older checkpoint all indexes, too.

        all_files: also look whether every rank's file is there in its whole length, which of a rank that reads its own
        share alone only that share needs. Raises Damaged.
        """
        path = Path(path)
        if path.is_symlink():
            raise Damaged(f"{path} is a link, and what lies among checkpoints is not followed; move the folder there")
        try:
            manifest = _manifest(path)
            indexes = Indexes(path, manifest["indexes"])
            ranks = range(len(indexes))
            if "ranges" in manifest:
                sizes, runs = manifest["bytes"], manifest["ranges"]
            else:
                sizes, runs = [indexes[rank].size for rank in ranks], runs_of(map(indexes.__getitem__, ranks))
            for rank in ranks if all_files else ():
                _check_length(indexes.data_file(rank), sizes[rank])
        except OSError as e:
            raise Damaged(f"{e.filename}: {e.strerror}") from None
        _check_sizes(path, manifest["tensors"])
        check_covered(path, runs, manifest["tensors"])
        return cls(path, manifest["meta"], manifest["tensors"], indexes, sizes, runs)

    def read_into(self, wanted: Iterable[tuple[str, int, np.ndarray]]) -> None:
        """Fill each (tensor name, first element, float32 array (length,)) with the checkpoint's values.

        Reads the indexes of the ranks that hold something wanted, and of their files every such block once. Raises
        Damaged, or KeyError for a tensor the checkpoint does not have. Arrays may have been written in part when it
        raises.
        """
        by_name = defaultdict(list)  # → (first element, last, array)
        ranks: set[int] = set()
        for name, start, out in wanted:
            stop = start + len(out)
            if stop > self.tensors[name]:
                raise ValueError(f"{name} has {self.tensors[name]} elements; asked for {start}…{stop}")
            if len(out):
                by_name[name].append((start, stop, out))
                ranks.update(*holders(self._runs[name], start, stop))
        for rank in sorted(ranks):
            index = self._index(rank)
            copies = defaultdict(list)  # block → (first byte in it, destination)
            for name in by_name.keys() & index.rows.keys():
                for piece, (start, stop, out) in itertools.product(index.of(name), by_name[name]):
                    plan(copies, index.block, piece, start, stop, out)
            for number in sorted(copies):
                block = self._block(rank, number)
                for low, target in copies[number]:
                    target[:] = block[low : low + len(target)]

    def tensor(self, name: str) -> np.ndarray:
        """A whole flat tensor, float32."""
        out = np.empty(self.tensors[name], np.float32)
        self.read_into([(name, 0, out)])
        return out

    def verify(self) -> None:
        """Check every block of every file. Raises Damaged at the first that is wrong."""
        for rank in range(len(self._indexes)):
            for number in range(len(self._index(rank).checksums)):
                self._block(rank, number)

    def _index(self, rank: int) -> Index:
        """A rank's, which says of its pieces and its file what the manifest says. Raises Damaged."""
        try:
            index = self._indexes[rank]
            _check_length(self._indexes.data_file(rank), index.size)
        except OSError as e:
            raise Damaged(f"{e.filename}: {e.strerror}") from None
        if index.size != self._sizes[rank] or sorted(index.ranges()) != pieces_of(self._runs, rank):
            raise Damaged(f"{self.path}: the index of rank {rank} has other pieces than the manifest says")
        return index

    def _block(self, rank: int, number: int) -> np.ndarray:
        """The verified bytes of one block of a rank's file."""
        index, path = self._indexes[rank], self._indexes.data_file(rank)
        start = number * index.block
        length = min(index.block, index.size - start)
        try:
            with open(open_regular(path, follow=False), "rb", buffering=0) as f:
                data = os.pread(f.fileno(), length, start)
        except OSError as e:
            raise Damaged(f"{path}: {e.strerror}") from None
        if len(data) != length or zlib.crc32(data) != index.checksums[number]:
            raise Damaged(f"{path}: the bytes from {start} to {start + length} are not those that were written")
        return np.frombuffer(data, np.uint8)

    @property
    def bytes(self) -> int:
        return sum(self._sizes)

    @property
    def files(self) -> int:
        """How many ranks wrote it."""
        return len(self._indexes)


def _check_length(path: Path, size: int) -> None:
    """Raises OSError and Damaged."""
    if (there := path.lstat().st_size) != size:
        raise Damaged(f"{path} is {there:,} bytes long, not {size:,}")
