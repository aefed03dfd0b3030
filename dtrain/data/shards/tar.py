"""Reads the headers of one tar shard: where each member's bytes lie, grouped into samples by WebDataset's naming rule.

`tarfile` parses the headers (ustar, GNU and PAX). It raises nothing when a file is cut at a member's boundary, or when
a header's checksum is wrong after the first member: it stops as if the archive had ended. So the end is checked here.
"""

import hashlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from dtrain.data.shards import remote
from dtrain.data.shards.manifest import ABSENT, RECORD
from dtrain.data.shards.sample_files import DOT_RULE, LABEL_FIELD, class_number
from dtrain.errors import UserError
from dtrain.files import opener

MEMBER = np.dtype(RECORD)
MAX_FIELDS = 64
MAX_HEADER = 1 << 20  # bytes of a long name or of PAX attributes

_META = re.compile(r"__[^/]*__($|/)")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_CHUNK = 1 << 20
_RANGE = 1 << 22  # bytes asked for at a time of a remote shard
# What tarfile lets through for bytes that are no tar, beside its own errors.
_UNREADABLE = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError)


@dataclass(frozen=True)
class Scan:
    """One shard: its field extensions, its members (samples, fields) as MEMBER records, its size and sha256.

    wrong_labels: how many labels are no class numbers, with the name of the first and what it holds; None: all are.
    """

    fields: list[str]
    members: np.ndarray
    bytes: int
    sha256: str
    wrong_labels: tuple[int, str, str] | None = None


def split_name(name: str) -> tuple[str, str] | None:
    """A member's (key, field): the name up to the first dot of its last component, and the rest in lower case.

    None for what WebDataset skips: names without an extension, dot files, `__meta__/` entries.
    """
    match = _NAME.fullmatch(name)
    if not match or _META.match(name):
        return None
    return match[1], match[2].lower()


class LocalShard:
    """A file open for reading by offset: `size` in bytes, `pread`, and a file object for whoever needs one."""

    def __init__(self, path: str | Path):
        self.file = open(path, "rb", opener=opener)  # noqa: SIM115 (closed by open_shard)
        self.size = os.fstat(self.file.fileno()).st_size

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self.file.fileno(), size, offset)


class RemoteShard:
    """The same for a URL, read near-sequentially: the last two ranges of 4 MiB are kept."""

    def __init__(self, url: str, size: int | None = None):
        self.size = remote.stat(url)[0] if size is None else size
        self._range = lru_cache(maxsize=2)(
            lambda n: remote.fetch(url, n * _RANGE, min((n + 1) * _RANGE, self.size), self.size)
        )
        self.file = io.BufferedReader(_Raw(self), 512)

    def pread(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`, fewer where the shard ends."""
        data = b""
        while len(data) < size and offset + len(data) < self.size:
            number, start = divmod(offset + len(data), _RANGE)
            part = self._range(number)[start : start + size - len(data)]
            if not part:
                break  # it has been cut off meanwhile
            data += part
        return data


class _Raw(io.RawIOBase):
    """A RemoteShard as a file."""

    def __init__(self, shard: RemoteShard):
        self._shard, self._at = shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._shard.size)[whence]
        return self._at

    def readinto(self, buffer) -> int:
        data = self._shard.pread(len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def open_shard(place: str | Path, size: int | None = None):
    """A local or remote shard to read by offset. Raises OSError, or for a URL what `remote.fetch` does."""
    shard = RemoteShard(str(place), size) if remote.is_url(place) else LocalShard(place)
    with shard.file:
        yield shard


def scan(place: Path | str, shown: str | None = None) -> Scan:
    """Index one shard, a path or URL, reading it once from end to end; messages call it `shown`.

    Raises UserError, naming the shard, for anything that is not a whole, uncompressed tar file of contiguous samples.
    """
    try:
        with open_shard(place) as shard:
            return _scan(shown or place, shard)
    except OSError as e:
        raise UserError(f"cannot read the shard {shown or place}: {e.strerror or e}") from None


def _scan(path: Path | str, file: LocalShard | RemoteShard) -> Scan:
    fields: dict[str, int] = {}
    samples: list[dict[int, tuple[int, int, int]]] = []
    keys: set[str] = set()
    current = wrong = None
    checksums = _Checksums(path, file)
    for member in _regular_members(path, file):
        named = split_name(member.name)
        if named is None:
            continue
        key, field = named
        column = fields.setdefault(field, len(fields))
        if len(fields) > MAX_FIELDS:
            raise UserError(
                f"{path} has more than {MAX_FIELDS} different extensions, the latest {field!r} of {member.name}; "
                f"{DOT_RULE}"
            )
        if key != current:
            if key in keys:
                raise UserError(
                    f"{path} has members of sample {key!r} in two places, the second at {member.name}; "
                    "the members of a sample must follow each other, so pack the shard again"
                    + (f"; {DOT_RULE}" if "." in field else "")
                )
            keys.add(key)
            current = key
            samples.append({})
        if column in samples[-1]:
            raise UserError(f"{path} has two members {key}.{field}; pack the shard again with names used once")
        if member.size >= ABSENT:
            raise UserError(f"{path}: {member.name} has {member.size:,} bytes; a member must be smaller than 4 GiB")
        crc = checksums.crc32(member.offset_data, member.size)
        samples[-1][column] = (member.offset_data, member.size, crc)
        if field == LABEL_FIELD and class_number(text := file.pread(min(member.size, 64), member.offset_data)) is None:
            first = wrong[1:] if wrong else (member.name, text.decode("latin-1"))
            wrong = ((wrong[0] if wrong else 0) + 1, *first)
    if not samples:
        raise UserError(f"{path} has no samples; leave it out or restore it")
    size = file.size
    sha256 = checksums.sha256(size)

    members = np.zeros((len(samples), len(fields)), dtype=MEMBER)
    members["size"] = ABSENT
    for row, sample in zip(members, samples, strict=True):
        for column, record in sample.items():
            row[column] = record
    return Scan(list(fields), members, size, sha256, wrong)


def member_name(path: Path, offset: int) -> str:
    """The name of the member whose bytes begin at `offset`; where the headers do not tell, its place. For messages."""
    try:
        with open(path, "rb", opener=opener) as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            for member in tar:
                if member.offset_data >= offset:
                    if member.offset_data == offset:
                        return member.name
                    break
                tar.members = []
    except (OSError, *_UNREADABLE):
        pass
    return f"the member at byte {offset:,}"


class _Headers:
    """A file for tarfile to read headers from. A long name may say that it has gigabytes, which tarfile would read."""

    def __init__(self, file):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a member's name or attributes have {size:,} bytes")
        return self._file.read(size)


class _Checksums:
    """sha256 of a whole file and crc32 of ranges in it, each byte read once and in order."""

    def __init__(self, path: Path | str, file: LocalShard | RemoteShard):
        self._path = path
        self._file = file
        self._digest = hashlib.sha256()
        self._position = 0

    def crc32(self, offset: int, size: int) -> int:
        self._advance(offset)
        return self._advance(offset + size)

    def sha256(self, size: int) -> str:
        self._advance(size)
        return self._digest.hexdigest()

    def _advance(self, end: int) -> int:
        crc = 0
        while self._position < end:
            chunk = self._file.pread(min(_CHUNK, end - self._position), self._position)
            if not chunk:
                raise UserError(f"{self._path} became shorter while it was read; index it when it is complete")
            self._digest.update(chunk)
            crc = zlib.crc32(chunk, crc)
            self._position += len(chunk)
        return crc


def _regular_members(path: Path | str, file: LocalShard | RemoteShard) -> Iterator[tarfile.TarInfo]:
    """The plain files of a tar in order, after which the archive is known to end where it should."""
    bytes_in_file = file.size
    again = "restore it or pack it again"
    try:
        with tarfile.open(fileobj=_Headers(file.file), mode="r:") as tar:
            end = -1
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile keeps every header it has seen
                if member.size < 0 or tar.offset <= end:
                    raise UserError(f"{path} has a header of impossible size at {member.name!r}; {again}")
                end = tar.offset
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(
                        f"{path}: {member.name} is a link, a sparse or a special file; "
                        "pack the shard again with plain files (GNU tar: --hard-dereference --dereference)"
                    )
                if member.offset_data + member.size > bytes_in_file:
                    raise UserError(f"{path} is cut off within {member.name}; {again}")
                yield member
            _check_end(path, file, tar.offset, bytes_in_file, again)
    except UserError:
        raise
    except _UNREADABLE as e:
        raise UserError(f"{path} is not a whole uncompressed tar file ({e}); {again}") from None


def _check_end(path: Path | str, file: LocalShard | RemoteShard, offset: int, bytes_in_file: int, again: str) -> None:
    """A tar ends in two blocks of 512 zeros, and nothing but zeros may follow them."""
    if bytes_in_file - offset < 1024:
        raise UserError(f"{path} is cut off at byte {bytes_in_file:,}, before its end-of-archive mark; {again}")
    while offset < bytes_in_file:
        chunk = file.pread(_CHUNK, offset)
        if not chunk or chunk.count(0) != len(chunk):
            raise UserError(f"{path} is damaged, or two tar files in one, at byte {offset:,} or soon after; {again}")
        offset += len(chunk)
