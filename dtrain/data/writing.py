"""Writes samples as tar shards from several processes, and goes on where a kill ended it, byte for byte the same.

Worker processes turn samples into tar members, which this process cuts into shards in their order. A shard gets its
name when it is whole and on the disk, and then a line in the record; only shards of the record are kept after a kill.
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.data.parallel import in_order
from dtrain.data.sources import Files, Source

PIECE = 64  # samples a worker turns into members at a time
_FEW = 4096  # samples, or fewer, are packed by this process: others take a while to start
_BLOCK, _RECORD = 512, 10240  # bytes of a tar's blocks, and of what its length is a multiple of


@dataclass(frozen=True)
class Limits:
    """A shard ends when it has so many samples, or fields of so many bytes."""

    samples: int
    bytes: int | None


def write_shards(
    source: Source,
    samples: np.ndarray,
    prefix: Path,
    limits: Limits,
    record: Path,
    report: Callable[[int], None],
    processes: int | None = None,
) -> list[Path]:
    """Shards `prefix-000000.tar`, … of these samples of a source, whose numbers are their keys; webdataset's bytes.

    record: a file beside the shards that says which are whole. report: called with the samples done. processes: default
    one a core, one for few samples. Raises OSError where the disk fails, and what the source's `files` raises.
    """
    counts = _recorded(record)
    shards = [_name(prefix, number) for number in range(len(counts))]
    done = sum(counts)
    left = samples[done:].tolist()
    pieces = (
        [(f"{i:08d}", source.item(i)) for i in left[first : first + PIECE]] for first in range(0, len(left), PIECE)
    )
    processes = processes or (1 if len(left) <= _FEW else None)
    members = (m for piece in in_order(partial(_members, source.files), pieces, processes) for m in piece)
    for shard in _cut(members, limits):
        path = _name(prefix, len(shards))
        count = _write(path, shard, lambda written, before=done: report(before + written))
        done += count
        _note(record, count)
        shards.append(path)
    return shards


def _name(prefix: Path, number: int) -> Path:
    return prefix.with_name(f"{prefix.name}-{number:06d}.tar")


def _members(files: Callable[[Any], Files], piece: list[tuple[str, Any]]) -> list[tuple[bytes, int]]:
    """Of each sample its tar members, and the bytes of its fields."""
    from webdataset import TarWriter

    found = []
    for key, item in piece:
        fields, file = files(item), io.BytesIO()
        with TarWriter(file, mtime=0, encoder=False) as writer:  # a fixed time, and fields as they shall be read
            size = writer.write({"__key__": key} | fields)
        length = sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for data in fields.values())
        found.append((file.getbuffer()[:length].tobytes(), size))
    return found


def _cut(members: Iterator[tuple[bytes, int]], limits: Limits) -> Iterator[Iterator[bytes]]:
    """The members of one shard after the other; each is to be taken before the next is asked for."""
    ahead = next(members, None)

    def shard() -> Iterator[bytes]:
        nonlocal ahead
        count = size = 0
        while ahead is not None and count < limits.samples and (limits.bytes is None or size < limits.bytes):
            count, size = count + 1, size + ahead[1]
            yield ahead[0]
            ahead = next(members, None)

    while ahead is not None:
        yield shard()


def _write(path: Path, members: Iterator[bytes], report: Callable[[int], None]) -> int:
    """Write one shard, durable before it has its name; the number of its samples."""
    temporary, count = path.with_suffix(".tar.tmp"), 0
    with open(temporary, "wb") as file:
        for count, data in enumerate(members, 1):
            file.write(data)
            report(count)
        end = file.tell() + 2 * _BLOCK
        file.write(bytes(2 * _BLOCK + -end % _RECORD))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return count


def _note(record: Path, count: int) -> None:
    with open(record, "a") as file:
        file.write(json.dumps({"samples": count}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _recorded(record: Path) -> list[int]:
    """The samples of each whole shard; a line that a kill cut off ends them, and is taken away."""
    if not record.exists():
        return []
    text = record.read_text()
    whole = text[: text.rfind("\n") + 1]
    os.truncate(record, len(whole))
    return [json.loads(line)["samples"] for line in whole.splitlines()]
