"""Reads the fields of single samples out of local shards, by offset, each verified by its crc32."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dtrain.data.manifest import Manifest
from dtrain.data.tar import ABSENT, member_name
from dtrain.errors import UserError

OPEN_SHARDS = 128  # descriptors a reader keeps; a process is commonly allowed 1,024


class ShardReader:
    """Samples by number. Holds no position (pread), so that a forked process may go on with its parent's reader."""

    def __init__(self, manifest: Manifest, directory: str | Path):
        self._manifest = manifest
        self._directory = Path(directory)
        self._members = np.asarray(manifest.members)  # a plain view: memmap's own indexing is slow
        self._ends = np.cumsum(manifest.shard_sizes)
        self._columns = {field: column for column, field in enumerate(manifest.fields)}
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, sample: int, fields: Sequence[str] | None = None) -> dict[str, bytes]:
        """The bytes of a sample's fields, of those asked for (default: all) that it has.

        Raises UserError, naming shard and member, for a missing shard, a short read, or a wrong crc32.
        """
        shard = self._shard(sample)
        members = self._members[sample]
        found = {}
        for field in self._manifest.fields if fields is None else fields:
            column = self._columns.get(field)
            if column is None or members[column]["size"] == ABSENT:
                continue
            offset, size, crc32 = members[column].tolist()
            data = self._pread(shard, size, offset)
            if len(data) < size or zlib.crc32(data) != crc32:
                problem = "is cut off" if len(data) < size else "is damaged (its crc32 is not the manifest's)"
                raise UserError(
                    f"{self.name(sample, field)} {problem}; restore the shard, or run `dtrain index` again "
                    "if it was replaced"
                )
            found[field] = data
        return found

    def name(self, sample: int, field: str | None = None) -> str:
        """For messages: `shard: member`, the member's name read from its header; a sample goes by its first field."""
        path = self._path(self._shard(sample))
        members = self._members[sample]
        column = int(np.argmax(members["size"] != ABSENT)) if field is None else self._columns[field]
        return f"{path}: {member_name(path, int(members[column]['offset']))}"

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self):
        self.close()

    def _shard(self, sample: int) -> int:
        if not 0 <= sample < self._manifest.samples:
            raise IndexError(f"sample {sample} is not one of {self._manifest.samples}")
        return int(np.searchsorted(self._ends, sample, side="right"))

    def _path(self, shard: int) -> Path:
        return self._directory / self._manifest.shards[shard].name

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`, fewer where the file ends."""
        try:
            descriptor = self._descriptor(shard)
            parts = []
            while size:
                part = os.pread(descriptor, size, offset)
                if not part:
                    break
                parts.append(part)
                size -= len(part)
                offset += len(part)
            return b"".join(parts)
        except OSError as e:
            path = self._path(shard)
            raise UserError(
                f"cannot read the shard {path}: {e.strerror}; restore it or run `dtrain index` again"
            ) from None

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
        else:
            self._descriptors[shard] = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
            if len(self._descriptors) > OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        return self._descriptors[shard]
