"""Writes samples as tar shards from several processes, and goes on where a kill ended it, byte for byte the same.

Worker processes turn samples into tar members, which this process cuts into shards in their order. A shard gets its
name when it is whole and on the disk, and then a line in the record; only shards of the record are kept after a kill.
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.data.pack.fitness import Files
from dtrain.data.pack.left_out import LeftOut, Unfit
from dtrain.data.pack.source import Source
from dtrain.data.shards.parallel import in_order

PIECE = 64  # samples a worker turns into members at a time
# Samples, or fewer, that are packed by this process: others take a while to start. Photographs are decoded.
_FEW, _FEW_FOREIGN = 4096, 256
_BLOCK, _RECORD = 512, 10240  # bytes of a tar's blocks, and of what its length is a multiple of


@dataclass(frozen=True)
class Limits:
    """A shard ends when it has so many samples, or fields of so many bytes."""

    samples: int
    bytes: int | None


@dataclass(frozen=True)
class Written:
    """samples: in the shards. left_out: those that were met before the last of them or, where they ran out, at all."""

    shards: list[Path]
    samples: int
    left_out: list[LeftOut]

    @property
    def met(self) -> int:
        return self.samples + len(self.left_out)


@dataclass(frozen=True)
class _Member:
    """A sample as it lies in a tar, the bytes of its fields, and what was left out since the sample before."""

    data: bytes
    size: int
    before: list[LeftOut]


def write_shards(
    source: Source,
    samples: np.ndarray,
    wanted: int,
    prefix: Path,
    limits: Limits,
    record: Path,
    report: Callable[[int], None],
    processes: int | None = None,
) -> Written:
    """Shards `prefix-000000.tar`, … of the first `wanted` of these samples that are fit; webdataset's bytes.

    A sample's number in the source is its key. record: a file beside the shards that says which are whole. report:
    called with the samples met. processes: default one a core, one for few samples. Raises OSError where the disk
    fails, and what the source's `files` raises.
    """
    lines = _recorded(record)
    shards = [_name(prefix, number) for number in range(len(lines))]
    count = sum(line["samples"] for line in lines)
    left_out = [LeftOut(*one) for line in lines for one in line.get("left_out", [])]
    last: list[LeftOut] = []
    members = _fit(source, samples[count + len(left_out) :].tolist(), wanted - count, processes, last)
    for shard in _cut(members, limits):
        met = count + len(left_out)
        path = _name(prefix, len(shards))
        written, skipped = _write(path, shard, lambda done, before=met: report(before + done))
        count += written
        left_out += skipped
        _note(record, written, skipped)
        shards.append(path)
    if last:
        left_out += last
        report(count + len(left_out))
    return Written(shards, count, left_out)


def _fit(
    source: Source, samples: list[int], wanted: int, processes: int | None, left_out: list[LeftOut]
) -> Iterator[_Member]:
    """Members of the first `wanted` samples that are fit. left_out: in the end, what was left out after the last.

    No more samples are begun than are still wanted, so that none is decoded in vain.
    """
    few = _FEW_FOREIGN if source.foreign else _FEW
    at = 0
    while wanted and at < len(samples):
        batch, begun = samples[at : at + wanted], at > 0
        at += len(batch)
        pieces = (
            [(f"{i:08d}", source.item(i)) for i in batch[first : first + PIECE]]
            for first in range(0, len(batch), PIECE)
        )
        # Also where processes were asked for, a few that make up for others are not worth starting them again.
        workers = 1 if len(batch) <= few and (processes is None or begun) else processes
        made = (m for piece in in_order(partial(_members, source.files), pieces, workers) for m in piece)
        for i, member in zip(batch, made, strict=True):
            if isinstance(member, str):
                left_out.append(source.unfit(i, member))
                continue
            yield _Member(*member, before=left_out[:])
            left_out.clear()
            wanted -= 1


def _name(prefix: Path, number: int) -> Path:
    return prefix.with_name(f"{prefix.name}-{number:06d}.tar")


def _members(files: Callable[[Any], Files], piece: list[tuple[str, Any]]) -> list[tuple[bytes, int] | str]:
    """(tar members, bytes of the fields) of each sample, or the reason to leave it out."""
    from webdataset import TarWriter

    found = []
    for key, item in piece:
        try:
            fields, file = files(item), io.BytesIO()
        except Unfit as e:
            found.append(e.args[0])
            continue
        with TarWriter(file, mtime=0, encoder=False) as writer:  # a fixed time, and fields as they shall be read
            size = writer.write({"__key__": key} | fields)
        length = sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for data in fields.values())
        found.append((file.getbuffer()[:length].tobytes(), size))
    return found


def _cut(members: Iterator[_Member], limits: Limits) -> Iterator[Iterator[_Member]]:
    """The members of one shard after the other; each is to be taken before the next is asked for."""
    ahead = next(members, None)

    def shard() -> Iterator[_Member]:
        nonlocal ahead
        count = size = 0
        while ahead is not None and count < limits.samples and (limits.bytes is None or size < limits.bytes):
            count, size = count + 1, size + ahead.size
            yield ahead
            ahead = next(members, None)

    while ahead is not None:
        yield shard()


def _write(path: Path, members: Iterator[_Member], report: Callable[[int], None]) -> tuple[int, list[LeftOut]]:
    """Write one shard, durable before it has its name; the number of its samples, and what was left out on the way."""
    temporary, count, left_out = path.with_suffix(".tar.tmp"), 0, []
    with open(temporary, "wb") as file:
        for count, member in enumerate(members, 1):
            file.write(member.data)
            left_out += member.before
            report(count + len(left_out))
        end = file.tell() + 2 * _BLOCK
        file.write(bytes(2 * _BLOCK + -end % _RECORD))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return count, left_out


def _note(record: Path, samples: int, left_out: list[LeftOut]) -> None:
    line = {"samples": samples} | ({"left_out": [astuple(one) for one in left_out]} if left_out else {})
    with open(record, "a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _recorded(record: Path) -> list[dict]:
    """What `_note` said of each whole shard; a line that a kill cut off ends them, and is taken away."""
    if not record.exists():
        return []
    text = record.read_text()
    whole = text[: text.rfind("\n") + 1]
    os.truncate(record, len(whole))
    return [json.loads(line) for line in whole.splitlines()]
