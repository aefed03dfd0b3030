"""Whether a side file is the one its manifest names: by its digest, which a node's processes find out once.

A second a gigabyte is too long for every rank of every start. So of a large file it is noted in the user's cache folder
that it was checked. A note trusts that folder, and that a file with the same device, inode, size and times of its last
changes is the same file; whoever changes a byte of it by any ordinary means changes the times. Members have their own
crc32 beside.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dtrain.data.shards.cache import default_directory

NOTED = 16 << 20  # bytes of a file of which it is noted that it was checked
COMPLETE = "complete"  # what a note says of a file in which no sample lacks a field
_ABSENT = b"\xff\xff\xff\xff"  # the size of a field that a sample lacks, as a side file has it
_PIECE = 1 << 22  # bytes read at a time: whole records


def checked(file: BinaryIO, sha256: str) -> bool | None:
    """None where an open file has another digest; else whether it is known that no sample of it lacks a field."""
    status = os.fstat(file.fileno())
    if status.st_size < NOTED:
        return _hashed(file, sha256)
    known = [sha256, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    note = default_directory() / f"checked-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]}"
    if (said := _said(note)) is not None:
        return said
    with _alone(note.with_suffix(".lock")):
        if (said := _said(note)) is None and (said := _hashed(file, sha256)) is not None:
            with suppress(OSError):  # a home that cannot be written costs time and nothing else
                temporary = note.with_suffix(f".{os.getpid()}")
                temporary.write_text(COMPLETE if said else "")
                os.replace(temporary, note)
    return said


def _hashed(file: BinaryIO, sha256: str) -> bool | None:
    digest, complete = hashlib.sha256(), True
    while piece := file.read(_PIECE):
        digest.update(piece)
        complete = complete and _ABSENT not in piece
    return complete if digest.hexdigest() == sha256 else None


def _said(note: Path) -> bool | None:
    try:
        return note.read_text() == COMPLETE
    except OSError:
        return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time, as far as the cache folder can be written and locked; a kill lets the next one in."""
    lock = None
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)  # whoever waits for it looks for a note first
            lock.close()
