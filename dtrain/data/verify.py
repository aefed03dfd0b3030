"""Compares every byte of every shard with its manifest, and says of each damaged shard what is wrong with it."""

import hashlib
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dtrain.data import remote
from dtrain.data.manifest import Manifest, Shard
from dtrain.data.parallel import each
from dtrain.data.tar import ABSENT, open_shard, scan
from dtrain.errors import BadSample, UserError

_CHUNK = 1 << 20
_LISTED = 3  # damaged members named of one shard
_FEW = 16


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
            digest, at = hashlib.sha256(), 0
            while at < shard.bytes and (chunk := file.pread(min(_CHUNK, shard.bytes - at), at)):
                digest.update(chunk)
                at += len(chunk)
            if at < shard.bytes:
                return f"is cut off at byte {at:,} of {shard.bytes:,}"
            if digest.hexdigest() == shard.sha256:
                return None
            if other := owners.get(digest.hexdigest()):
                return f"is another shard: it holds what the manifest says of {other}"
            return f"differs from its manifest{_damaged_members(file, first, end, side)}{_contents(place)}"
    except FileNotFoundError:
        return "is missing"
    except BadSample as e:
        return str(e).removeprefix(f"{place} ")
    except OSError as e:
        raise UserError(f"cannot read the shard {place}: {e.strerror or e}") from None


def _damaged_members(file, first: int, end: int, side: tuple[str, list[str]]) -> str:
    """Which samples' members do not have their crc32; none where only headers or padding differ."""
    from dtrain.data.tar import MEMBER

    path, fields = side
    members = np.memmap(path, dtype=MEMBER, mode="r").reshape(-1, len(fields))[first:end]
    damaged = []
    for row, sample in enumerate(members):
        for field, (offset, size, crc32) in zip(fields, sample.tolist(), strict=True):
            if size != ABSENT and zlib.crc32(file.pread(size, offset)) != crc32:
                damaged.append(f"{field} of sample {row}")
    if not damaged:
        return " outside its members"
    more = f" and {len(damaged) - _LISTED:,} more" if len(damaged) > _LISTED else ""
    return f" in {', '.join(damaged[:_LISTED])}{more}"


def _contents(place: str) -> str:
    """What indexing says of a shard that is not the manifest's."""
    if remote.is_url(place):
        return ""
    try:
        scan(place)
    except UserError as e:
        return f"; {str(e).removeprefix(f'{os.fspath(place)} ').removeprefix(f'{place}: ')}"
    return "; a whole tar file, but another than was indexed"
