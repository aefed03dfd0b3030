"""Compares every byte of every shard with its manifest, and says of each damaged shard what is wrong with it.

The members are compared too: a side file may say wrong where they are in a shard that is whole.
"""

import hashlib
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dtrain.addresses import kept
from dtrain.data.shards import remote
from dtrain.data.shards.manifest import ABSENT, Manifest, Shard
from dtrain.data.shards.parallel import each
from dtrain.data.shards.tar import MEMBER, open_shard, scan
from dtrain.errors import BadSample, UserError

_CHUNK = 1 << 20
_LISTED = 3  # damaged members named of one shard
_FEW = 16
_BLOCK = 512  # bytes of a tar file's header, and what its members are aligned to
_Span = tuple[int, int, int, str]  # offset, size, crc32, name


def verify(
    manifest: Manifest,
    directory: str | Path,
    progress: Callable[[int], None] | None = None,
    processes: int | None = None,
) -> dict[str, str]:
    """Shard → what is wrong with it, in the manifest's order; empty where all is whole.

    Reads each shard once in pieces of 1 MiB, in several processes. Raises UserError only where a disk or server fails.
    """
    ends = np.cumsum(manifest.shard_sizes)
    jobs = [(shard, int(end) - shard.samples, int(end)) for shard, end in zip(manifest.shards, ends, strict=True)]
    owners = {shard.sha256: shard.name for shard in manifest.shards}
    directory = kept(str(directory))
    processes = processes or (1 if len(jobs) <= _FEW else None)
    work = partial(_problem, directory=str(directory), owners=owners, side=_side_file(manifest))
    found: dict[int, str] = {}
    for number, problem in each(work, jobs, processes):
        if problem is not None:
            found[number] = problem
        if progress:
            progress(manifest.shards[number].bytes)
    return {_place(str(directory), manifest.shards[n].name): found[n] for n in sorted(found)}


def _side_file(manifest: Manifest) -> tuple[str, list[str]]:
    return str(manifest.members.filename), manifest.fields


def _place(directory: str, name: str) -> str:
    return remote.join(directory, name) if remote.is_url(directory) else str(Path(directory) / name)


def _problem(job: tuple[Shard, int, int], directory: str, owners: dict, side: tuple[str, list[str]]) -> str | None:
    shard, first, end = job
    place = _place(directory, shard.name)
    if remote.is_pipe(place):
        raise UserError("shards of `pipe:` commands cannot be verified; they are checked while they are read")
    try:
        with open_shard(place, None if not remote.is_url(place) else shard.bytes) as file:
            if file.size != shard.bytes:
                kind = "empty" if not file.size else "shorter" if file.size < shard.bytes else "longer"
                return f"has {file.size:,} bytes, not {shard.bytes:,} ({kind}){_contents(place)}"
            spans, misplaced = _members(shard, first, end, side)
            digest, at, damaged = _read_through(file, shard.bytes, spans)
            if at < shard.bytes:
                return f"is cut off at byte {at:,} of {shard.bytes:,}"
            wrong = [*misplaced, *damaged]
            if digest == shard.sha256:
                if not wrong:
                    return None
                return f"is whole, but the side file is wrong about {_listed(wrong)}; run `dtrain index` again"
            if other := owners.get(digest):
                return f"is another shard: it holds what the manifest says of {other}"
            where = f"in {_listed(wrong)}" if wrong else "outside its members"
            return f"differs from its manifest {where}{_contents(place)}"
    except FileNotFoundError:
        return "is missing"
    except BadSample as e:
        return str(e).removeprefix(f"{place} ")
    except OSError as e:
        raise UserError(f"cannot read the shard {place}: {e.strerror or e}") from None


def _members(shard: Shard, first: int, end: int, side: tuple[str, list[str]]) -> tuple[list[_Span], list[str]]:
    """Where the side file says that the shard's members are, in order; and those that no tar file has there.

    A member begins on a multiple of 512, behind its header and what comes before it.
    """
    path, fields = side
    table = np.memmap(path, dtype=MEMBER, mode="r").reshape(-1, len(fields))[first:end]
    rows, columns = np.nonzero(table["size"] != ABSENT)
    members = table[rows, columns]
    order = np.argsort(members["offset"], kind="stable")
    offsets, sizes = members["offset"][order], members["size"][order].astype(np.uint64)
    inside = (offsets <= shard.bytes) & (sizes <= shard.bytes - np.minimum(offsets, shard.bytes))
    ends = np.where(inside, offsets + sizes, 0)
    wrong = ~inside | (offsets % _BLOCK != 0) | (offsets < _BLOCK)
    wrong[1:] |= offsets[1:] - np.minimum(offsets[1:], ends[:-1]) < _BLOCK
    names = [f"{fields[columns[n]]} of sample {rows[n]}" for n in order.tolist()]
    found = zip(offsets.tolist(), sizes.tolist(), members["crc32"][order].tolist(), names, wrong.tolist(), strict=True)
    spans = [(offset, size, crc32, name) for offset, size, crc32, name, bad in found if not bad]
    return spans, [name for name, bad in zip(names, wrong, strict=True) if bad]


def _read_through(file, length: int, spans: list[_Span]) -> tuple[str, int, list[str]]:
    """(sha256, bytes read, members without their crc32) of a shard, read once in pieces."""
    digest, at, damaged, number, crc = hashlib.sha256(), 0, [], 0, 0
    while at < length and (chunk := memoryview(file.pread(min(_CHUNK, length - at), at))):
        digest.update(chunk)
        while number < len(spans):
            offset, size, crc32, name = spans[number]
            crc = zlib.crc32(chunk[max(0, offset - at) : max(0, offset + size - at)], crc)
            if offset + size > at + len(chunk):
                break
            if crc != crc32:
                damaged.append(name)
            number, crc = number + 1, 0
        at += len(chunk)
    return digest.hexdigest(), at, damaged


def _listed(members: list[str]) -> str:
    more = f" and {len(members) - _LISTED:,} more" if len(members) > _LISTED else ""
    return f"{', '.join(members[:_LISTED])}{more}"


def _contents(place: str) -> str:
    """What indexing says of a shard that is not the manifest's."""
    if remote.is_url(place):
        return ""
    try:
        scan(place)
    except UserError as e:
        return f"; {str(e).removeprefix(f'{os.fspath(place)} ').removeprefix(f'{place}: ')}"
    return "; a whole tar file, but another than was indexed"
