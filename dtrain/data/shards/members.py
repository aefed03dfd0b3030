"""Single members of a local data set, read where the side file says they lie. Imports no torch and no NumPy.

For a glance at a few; a training reads through `reader.py`, which checks every byte.
"""

import errno
import os
import struct
import zlib
from bisect import bisect_right
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from dtrain.data.shards.manifest import ABSENT, RECORD_BYTES, Manifest
from dtrain.files import open_regular, opener

_RECORD = struct.Struct("<QII")  # manifest.RECORD without NumPy: offset, size, crc32


class Members:
    """Reads members of the shards in a folder; made by `open_members`."""

    def __init__(self, manifest: Manifest, directory: Path, side):
        self._manifest, self._directory, self._side = manifest, directory, side
        self._ends = list(accumulate(shard.samples for shard in manifest.shards))
        self._open: tuple[int, int] | None = None  # the shard read last, and its descriptor

    def of(self, sample: int) -> dict[str, tuple[int, int]]:
        """Field → (offset, size) of those that a sample has."""
        return {field: (offset, size) for field, (offset, size, _) in self._records(sample).items()}

    def head(self, sample: int, field: str, most: int) -> bytes:
        """The first `most` bytes of a member. Raises KeyError where the sample has no such field.

        Raises OSError as `read` does, and where a member of at most so many bytes is not as it was indexed.
        """
        offset, size, crc32 = self._records(sample)[field]
        data = self.read(sample, offset, min(size, most))
        if size <= most and zlib.crc32(data) != crc32:
            raise OSError(errno.EIO, "a member is not as it was indexed")
        return data

    def read(self, sample: int, offset: int, size: int) -> bytes:
        """Bytes of the sample's shard. Raises OSError where it cannot be read, or has not so many bytes."""
        number = bisect_right(self._ends, sample)
        shard = self._manifest.shards[number]
        if offset + size > shard.bytes:
            raise OSError(errno.EINVAL, "a member lies beyond the shard's end", shard.name)
        if self._open is None or self._open[0] != number:
            self.close()
            self._open = number, open_regular(self._directory / shard.name)
        return os.pread(self._open[1], size, offset)

    def _records(self, sample: int) -> dict[str, tuple[int, int, int]]:
        width = len(self._manifest.fields) * RECORD_BYTES
        records = _RECORD.iter_unpack(os.pread(self._side.fileno(), width, sample * width))
        named = zip(self._manifest.fields, records, strict=True)
        return {field: record for field, record in named if record[1] != ABSENT}

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


@contextmanager
def open_members(manifest: Manifest, directory: str | Path):
    with open(manifest.side, "rb", buffering=0, opener=opener) as side:
        members = Members(manifest, Path(directory), side)
        try:
            yield members
        finally:
            members.close()


def evenly(manifest: Manifest, count: int) -> list[int]:
    """`count` samples spread over a data set, or all of them."""
    count = min(count, manifest.samples)
    return [i * manifest.samples // count for i in range(count)]
