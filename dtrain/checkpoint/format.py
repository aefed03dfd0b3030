"""The checkpoint on disk: pieces of flat global tensors, one safetensors file and one JSON index a rank.

    step-00001000/
        manifest.json            what is in it; names every index with its hash
        rank-00000.safetensors   this rank's pieces
        rank-00000.json          where each piece lies, and a checksum of every block of the file

A tensor is flat and named "<parameter>:<fp32 | exp_avg | exp_avg_sq | ema_i>". A piece is (name, start, length).
Nothing here knows a world size or a ZeRO stage: a reader asks for any slice and gets it from whichever files hold it.
Nothing is pickled, so reading runs no code; every byte is checked before it is used.
"""

import hashlib
import json
import os
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from dtrain import faults
from dtrain.checkpoint.directory import LARGEST
from dtrain.files import open_regular, parse_json, read_bytes, read_json

FORMAT = 1
BLOCK = 16 * 2**20  # bytes under one checksum


class Damaged(Exception):
    """A checkpoint is incomplete or its bytes are not those that were written. The message names file and place."""


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


def file_stem(rank: int) -> str:
    return f"rank-{rank:05d}"


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


def write_manifest(directory: Path, world_size: int, tensors: dict[str, int], meta: dict[str, Any]) -> None:
    """The last file of a checkpoint. Raises Damaged when a rank's index is missing."""
    indexes = {}
    for rank in range(world_size):
        name = f"{file_stem(rank)}.json"
        try:
            indexes[name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        except OSError as e:
            raise Damaged(f"{directory / name}: {e.strerror}") from None
    body = {"format": FORMAT, "indexes": indexes, "tensors": tensors, "meta": meta}
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
        and all(re.fullmatch(r"rank-[0-9]{5,9}\.json", name) and isinstance(d, str) for name, d in indexes.items())
        and isinstance(tensors, dict)
        and all(map(_count, tensors.values()))
        and isinstance(meta, dict)
        and all(_count(meta.get(key, 0)) for key in ("step", "images", "optimizer_steps"))
    ):
        raise Damaged(f"{place} has not the form of a checkpoint's manifest")
    return found


def _index(path: Path, name: str, digest: str) -> dict[str, Any]:
    """A rank's index, of the form that `write_file` gives it. Raises OSError and Damaged."""
    place = path / name
    data = read_bytes(place, LARGEST, follow=False)
    if hashlib.sha256(data).hexdigest() != digest:
        raise Damaged(f"{place} is not the index that was written with this checkpoint")
    try:
        found = parse_json(data)
        size, block, checksums, pieces = (found[key] for key in ("bytes", "block", "crc32", "pieces"))
        formed = (
            found["file"] == f"{Path(name).stem}.safetensors"
            and _count(size)
            and _count(block)
            and block > 0
            and len(checksums) == -(-size // block)
            and all(map(_count, checksums))
            and all(type(piece[0]) is str and len(piece) == 4 and all(map(_count, piece[1:])) for piece in pieces)
        )
    except (ValueError, KeyError, TypeError, IndexError):
        formed = False
    if not formed:
        raise Damaged(f"{place} has not the form of a rank's index")
    end = 0
    for piece, _, length, offset in sorted(pieces, key=itemgetter(3)):
        if offset < end or offset + 4 * length > size:
            raise Damaged(f"{place} places {piece} where it cannot be in a file of {size:,} bytes")
        end = offset + 4 * length
    return found


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_sizes(path: Path, tensors: dict[str, int]) -> None:
    """Raises Damaged where moments or averages of a parameter have not as many elements as its weights."""
    for name, size in tensors.items():
        weights = tensors.get(f"{name.rpartition(':')[0]}:fp32", size)
        if weights != size:
            raise Damaged(f"{path}: {name} has {size:,} elements, its weights {weights:,}")


@dataclass
class _File:
    """One rank's data file while reading: blocks are verified the first time they are touched."""

    path: Path
    size: int
    block: int
    checksums: list[int]

    def read_block(self, number: int) -> np.ndarray:
        """The verified bytes of one block."""
        start = number * self.block
        length = min(self.block, self.size - start)
        try:
            with open(open_regular(self.path, follow=False), "rb", buffering=0) as f:
                data = os.pread(f.fileno(), length, start)
        except OSError as e:
            raise Damaged(f"{self.path}: {e.strerror}") from None
        if len(data) != length or zlib.crc32(data) != self.checksums[number]:
            raise Damaged(f"{self.path}: the bytes from {start} to {start + length} are not those that were written")
        return np.frombuffer(data, np.uint8)


@dataclass
class Checkpoint:
    """A complete checkpoint, open for reading."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, int]  # name → elements
    _files: dict[str, _File] = field(repr=False)
    _pieces: dict[str, list[tuple[int, int, int, str]]] = field(repr=False)  # name → (start, length, offset, file)

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read the manifest and all indexes, checking hashes, sizes and that the pieces cover every tensor.

        Raises Damaged.
        """
        path = Path(path)
        if path.is_symlink():
            raise Damaged(f"{path} is a link, and what lies among checkpoints is not followed; move the folder there")
        try:
            manifest = _manifest(path)
            files, pieces = {}, defaultdict(list)
            for name, digest in manifest["indexes"].items():
                index = _index(path, name, digest)
                file = _File(path / index["file"], index["bytes"], index["block"], index["crc32"])
                if file.path.lstat().st_size != file.size:
                    raise Damaged(f"{file.path} is {file.path.lstat().st_size:,} bytes long, not {file.size:,}")
                files[index["file"]] = file
                for piece, start, length, offset in index["pieces"]:
                    pieces[piece].append((start, length, offset, index["file"]))
        except OSError as e:
            raise Damaged(f"{e.filename}: {e.strerror}") from None
        _check_sizes(path, manifest["tensors"])
        for name, numel in manifest["tensors"].items():
            covered = 0
            for start, length, _, _ in sorted(pieces[name]):
                if start > covered:
                    break
                covered = max(covered, start + length)
            if covered < numel:
                raise Damaged(f"{path}: elements {covered:,}… of {name} are missing")
        return cls(path, manifest["meta"], manifest["tensors"], files, dict(pieces))

    def read_into(self, wanted: Iterable[tuple[str, int, np.ndarray]]) -> None:
        """Fill each (tensor name, first element, float32 array (length,)) with the checkpoint's values.

        Reads every block once, and only the blocks that hold something wanted. Raises Damaged, or KeyError for a tensor
        the checkpoint does not have. Arrays may have been written in part when it raises.
        """
        copies = defaultdict(list)  # (file, block) → [(first byte in file, bytes, destination)]
        for name, start, out in wanted:
            if start + len(out) > self.tensors[name]:
                raise ValueError(f"{name} has {self.tensors[name]} elements; asked for {start}…{start + len(out)}")
            for piece_start, length, offset, file_name in self._pieces[name]:
                first, last = max(start, piece_start), min(start + len(out), piece_start + length)
                if first >= last:
                    continue
                target = out[first - start : last - start].view(np.uint8)
                at, stop = offset + 4 * (first - piece_start), offset + 4 * (last - piece_start)
                block_size = self._files[file_name].block
                for number in range(at // block_size, (stop - 1) // block_size + 1):
                    low, high = max(at, number * block_size), min(stop, (number + 1) * block_size)
                    copies[file_name, number].append((low - number * block_size, target[low - at : high - at]))
        for (file_name, number), targets in sorted(copies.items(), key=lambda item: item[0]):
            block = self._files[file_name].read_block(number)
            for low, target in targets:
                target[:] = block[low : low + len(target)]

    def tensor(self, name: str) -> np.ndarray:
        """A whole flat tensor, float32."""
        out = np.empty(self.tensors[name], np.float32)
        self.read_into([(name, 0, out)])
        return out

    def verify(self) -> None:
        """Check every block of every file. Raises Damaged at the first that is wrong."""
        for file in self._files.values():
            for number in range(len(file.checksums)):
                file.read_block(number)

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self._files.values())

    @property
    def files(self) -> int:
        """How many ranks wrote it."""
        return len(self._files)
