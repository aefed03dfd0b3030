"""Reads the fields of single samples out of shards, by offset, each verified by its crc32."""

import os
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from dtrain.data.shards import remote
from dtrain.data.shards.cache import BLOCK, BlockCache
from dtrain.data.shards.manifest import ABSENT, Manifest
from dtrain.data.shards.tar import member_name
from dtrain.errors import BadSample, UserError
from dtrain.files import open_regular

OPEN_SHARDS = 256  # descriptors that readers keep, one a stream; a process is commonly allowed 1,024
CONNECTIONS = 16  # ranges a reader asks for at a time: object stores answer late, but many at once
RUN = 16  # blocks asked for in one range


class ShardReader:
    """Samples by number. Holds no position (pread), so that a forked process may go on with its parent's reader.

    directory: the folder of the shards, or a URL, whose blocks then go through `cache`. open_shards: descriptors kept.
    bytes_read: from the disk or the network; cache_hits and cache_misses: blocks. All since the reader was made.
    """

    def __init__(
        self,
        manifest: Manifest,
        directory: str | Path,
        cache: BlockCache | None = None,
        open_shards: int = OPEN_SHARDS,
    ):
        self._manifest = manifest
        self._files = (
            _RemoteFiles(manifest, str(directory), cache or BlockCache(None, 16 << 30))
            if remote.is_url(directory)
            else _LocalFiles(manifest, Path(directory), open_shards)
        )
        self._members = np.asarray(manifest.members)  # a plain view: memmap's own indexing is slow
        self._ends = np.cumsum(manifest.shard_sizes).tolist()
        self._bytes = [shard.bytes for shard in manifest.shards]
        self._columns = {field: column for column, field in enumerate(manifest.fields)}

    @property
    def counts(self) -> tuple[int, int, int]:
        """(bytes read, cache hits, cache misses) so far."""
        return self._files.bytes_read, self._files.cache_hits, self._files.cache_misses

    def read(self, sample: int, fields: Sequence[str] | None = None) -> dict[str, bytes]:
        """The bytes of a sample's fields, of those asked for (default: all) that it has.

        Raises BadSample, naming shard and member, for a missing shard, a short read, or a wrong crc32; UserError where
        the disk or the server fails.
        """
        shard = self._shard(sample)
        members = self._members[sample].tolist()
        found = {}
        for field in self._manifest.fields if fields is None else fields:
            column = self._columns.get(field)
            if column is None:
                continue
            offset, size, crc32 = members[column]
            if size == ABSENT:
                continue
            if offset + size > self._bytes[shard]:
                raise BadSample(
                    f"{self._files.place(shard)}: the side file of {self._manifest.path} places {field} of sample "
                    f"{sample:,} behind the shard's end; run `dtrain index` again"
                )
            data = self._files.pread(shard, size, offset)
            whole = zlib.crc32(data) == crc32
            if len(data) == size and not whole:
                data = self._files.pread_again(shard, size, offset, data)
                whole = zlib.crc32(data) == crc32
            if len(data) < size or not whole:
                problem = "is cut off" if len(data) < size else "is damaged (its crc32 is not the manifest's)"
                raise BadSample(
                    f"{self.name(sample, field)} {problem}; restore the shard, or run `dtrain index` again "
                    "if it was replaced"
                )
            found[field] = data
        return found

    def prefetch(self, samples: Sequence[int], fields: Sequence[str]) -> None:
        """Bring what these samples need from a remote place into the cache, many ranges at once; local: nothing."""
        if not isinstance(self._files, _RemoteFiles):
            return
        columns = [self._columns[f] for f in fields if f in self._columns]
        ranges = []
        for sample in samples:
            shard = self._shard(sample)
            for offset, size, _ in self._members[sample][columns].tolist():
                if size != ABSENT and offset + size <= self._bytes[shard]:
                    ranges.append((shard, offset, size))
        self._files.prefetch(ranges)

    def fields_of(self, sample: int) -> list[str]:
        """The fields that a sample has."""
        there = self._members[sample]["size"] != ABSENT
        return [field for field, column in self._columns.items() if there[column]]

    def name(self, sample: int, field: str | None = None) -> str:
        """For messages: `shard: member`, the member's name read from its header; a sample goes by its first field."""
        shard = self._shard(sample)
        members = self._members[sample]
        column = int(np.argmax(members["size"] != ABSENT)) if field is None else self._columns[field]
        return f"{self._files.shown(shard)}: {self._files.member(shard, int(members[column]['offset']))}"

    def close(self) -> None:
        self._files.close()

    def _shard(self, sample: int) -> int:
        if not 0 <= sample < self._ends[-1]:
            raise IndexError(f"sample {sample} is not one of {self._ends[-1]}")
        return bisect_right(self._ends, sample)


class _LocalFiles:
    def __init__(self, manifest: Manifest, directory: Path, open_shards: int):
        self._manifest = manifest
        self._directory = directory
        self._most = open_shards
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self.bytes_read = self.cache_hits = self.cache_misses = 0

    def place(self, shard: int) -> Path:
        return self._directory / self._manifest.shards[shard].name

    shown = place

    def member(self, shard: int, offset: int) -> str:
        return member_name(self.place(shard), offset)

    def pread(self, shard: int, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`, fewer where the file ends."""
        try:
            descriptor = self._descriptor(shard)
            data = os.pread(descriptor, size, offset)
            while len(data) < size and (part := os.pread(descriptor, size - len(data), offset + len(data))):
                data += part
            self.bytes_read += len(data)
            return data
        except OSError as e:
            missing = isinstance(e, FileNotFoundError)
            raise (BadSample if missing else UserError)(
                f"cannot read the shard {self.place(shard)}: {e.strerror}; restore it or run `dtrain index` again"
            ) from None

    def pread_again(self, shard: int, size: int, offset: int, data: bytes) -> bytes:
        return data

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self):
        self.close()

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
        else:
            self._descriptors[shard] = open_regular(self.place(shard))
            if len(self._descriptors) > self._most:
                os.close(self._descriptors.popitem(last=False)[1])
        return self._descriptors[shard]


class _RemoteFiles:
    """Shards behind URLs, block by block through the cache; those of `pipe:` commands as one block each."""

    def __init__(self, manifest: Manifest, base: str, cache: BlockCache):
        self._manifest, self._base, self._cache = manifest, base, cache
        self._pool = None  # made by the process that uses it: threads do not survive a fork
        self.bytes_read = self.cache_hits = self.cache_misses = 0

    def place(self, shard: int) -> str:
        return remote.join(self._base, self._manifest.shards[shard].name)

    def shown(self, shard: int) -> str:
        return remote.shown(self._base, self._manifest.shards[shard].name, shard)

    def member(self, shard: int, offset: int) -> str:
        return f"the member at byte {offset:,}"

    def pread(self, shard: int, size: int, offset: int) -> bytes:
        if remote.is_pipe(self._base):
            return self._from_pipe(shard, size, offset)
        parts = []
        for block in self._blocks(offset, size):
            start, stop = max(offset - block * BLOCK, 0), min(offset + size - block * BLOCK, BLOCK)
            length = self._length(shard, block)
            part = self._cache.read(self._key(shard), block, length, start, min(stop, length))
            if part is None:
                self.cache_misses += 1
                part = self._fetch(shard, block, block + 1)[start:stop]
            else:
                self.cache_hits += 1
            parts.append(part)
        return b"".join(parts)

    def pread_again(self, shard: int, size: int, offset: int, data: bytes) -> bytes:
        """Past the cache: its disk may have failed, or a kill and a power cut left a block of zeros."""
        for block in self._blocks(offset, size):
            self._cache.drop(self._key(shard), block)
        if remote.is_pipe(self._base):
            self._cache.drop(self._key(shard), "whole")
        return self.pread(shard, size, offset)

    def prefetch(self, ranges: list[tuple[int, int, int]]) -> None:
        if remote.is_pipe(self._base):
            return
        wanted = sorted({(shard, block) for shard, offset, size in ranges for block in self._blocks(offset, size)})
        missing = [(s, b) for s, b in wanted if not self._cache.has(self._key(s), b, self._length(s, b))]
        runs: list[list[int]] = []
        for shard, block in missing:
            if runs and runs[-1][0] == shard and runs[-1][2] == block and block - runs[-1][1] < RUN:
                runs[-1][2] += 1
            else:
                runs.append([shard, block, block + 1])
        self.cache_misses += len(missing)
        self.cache_hits -= len(missing)  # when they are read, they will be found
        if not runs:
            return
        from concurrent.futures import ThreadPoolExecutor

        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (os.getpid(), ThreadPoolExecutor(CONNECTIONS))
        for future in [self._pool[1].submit(self._fetch, *run) for run in runs]:
            with suppress(BadSample):  # whoever reads the sample meets it again, and knows its name
                future.result()

    def close(self) -> None:
        if self._pool is not None and self._pool[0] == os.getpid():
            self._pool[1].shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _from_pipe(self, shard: int, size: int, offset: int) -> bytes:
        key, length = self._key(shard), self._manifest.shards[shard].bytes
        data = self._cache.read(key, "whole", length, offset, offset + size)
        self.cache_hits, self.cache_misses = self.cache_hits + (data is not None), self.cache_misses + (data is None)
        if data is None:
            place = self.shown(shard)

            def make(path: Path) -> None:
                remote.run_pipe(self.place(shard), path, place)
                got = path.stat().st_size
                self.bytes_read += got
                if got != length:
                    raise BadSample(
                        f"{place} gives {got:,} bytes, its manifest says {length:,}; run `dtrain index` again"
                    )

            self._cache.fill(key, "whole", make)
            data = self._cache.read(key, "whole", length, offset, offset + size)
        if data is None:
            raise UserError(f"data.cache_bytes {self._cache.limit:,} has no room for {self.shown(shard)}; raise it")
        return data

    def _key(self, shard: int) -> str:
        """By what the shard holds: a shard that was replaced is never read from old blocks."""
        return f"{self._manifest.shards[shard].sha256} {self._manifest.shards[shard].bytes}"

    def _blocks(self, offset: int, size: int) -> range:
        return range(offset // BLOCK, (offset + size - 1) // BLOCK + 1) if size else range(0)

    def _length(self, shard: int, block: int) -> int:
        return min(BLOCK, self._manifest.shards[shard].bytes - block * BLOCK)

    def _fetch(self, shard: int, first: int, end: int) -> bytes:
        """Blocks first..end as one range, each put into the cache where it came whole."""
        size = self._manifest.shards[shard].bytes
        data = remote.fetch(self.place(shard), first * BLOCK, min(end * BLOCK, size), size)
        self.bytes_read += len(data)
        for block in range(first, end):
            part = data[(block - first) * BLOCK : (block - first + 1) * BLOCK]
            if len(part) == self._length(shard, block):
                self._cache.write(self._key(shard), block, part)
        return data
