"""Files: written whole or not at all, read only where they are what they should be; a thing's name as a file's.

What lies in a run or beside shards may be cut off, replaced or made by somebody else. Nothing here waits for a FIFO's
other end, reads a device, or takes more bytes or a deeper nesting than the caller allows.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

MOST_DEPTH = 32  # of JSON that is taken; what dtrain writes nests to 6
MOST_BYTES = 1 << 20  # of a small file, unless a caller says another number

_NODES = {dict, list}

LONGEST_NAME = 100  # characters, each of up to 2 bytes; file systems take 255 bytes with what is put around it


def as_file_name(name: str, longest: int = LONGEST_NAME) -> str:
    """`name` as the name of one file or folder: itself where that says nothing else, else with a short hash.

    So that no name is a path: no separator, no `..`, no control characters, not too long.
    """
    plain = re.sub(r"[^\w.\- ]", "_", name)
    if plain == name and name.strip(". ") and len(name.encode()) <= longest:
        return name
    cut = re.sub(r"[^\x20-\x7e]", "_", plain).strip(". ")[: longest - 9]
    return f"{cut}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Bytes for `path`, which has them all, durable, or stays as it was. Raises OSError."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def open_regular(path: str | Path, follow: bool = True, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file, to be closed by the caller; never waits, as opening a FIFO would.

    follow: whether `path` itself may be a link. Raises OSError, also for whatever is not a regular file.
    """
    path = os.fspath(path)
    if "\0" in path:
        raise OSError(errno.EINVAL, "its name has a NUL", path)
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as e:
        if e.errno == errno.ENXIO or (e.errno == errno.ELOOP and not follow):
            raise _not_regular(path) from None
        raise
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path) if stat.S_ISDIR(kind) else _not_regular(path)
    return descriptor


def opener(path: str, flags: int) -> int:
    """For `open(path, mode, opener=opener)`: as `open_regular`."""
    return open_regular(path, flags=flags)


def read_bytes(path: str | Path, most: int = MOST_BYTES, follow: bool = True) -> bytes:
    """A regular file of at most `most` bytes. Raises OSError."""
    with open(open_regular(path, follow), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"has {size:,} bytes, more than {most:,}", os.fspath(path))
        return file.read(most)


def read_json(path: str | Path, most: int = MOST_BYTES, follow: bool = True) -> Any:
    """The plain data of a JSON file. Raises OSError, and ValueError as `parse_json` does."""
    return parse_json(read_bytes(path, most, follow))


def parse_json(text: bytes | str, most_depth: int | None = MOST_DEPTH) -> Any:
    """Plain data that nests to at most `most_depth`; None: as deep as can be read, for a caller who knows each value's
    form. Raises ValueError for anything else.
    """
    from pydantic_core import from_json  # in a third of the time; whoever reads no JSON does not wait for its import

    try:
        found = from_json(text)
    except ValueError:  # also of what the standard library takes: half a surrogate pair, a byte-order mark
        try:
            found = json.loads(text)
        except RecursionError:
            raise ValueError(f"it nests deeper than {MOST_DEPTH}") from None
    brackets = ("{", "[") if isinstance(text, str) else (b"{", b"[")
    if most_depth is not None and sum(map(text.count, brackets)) > most_depth and _depth_over(found, most_depth):
        raise ValueError(f"it nests deeper than {most_depth}")
    return found


def beside(path: Path, pattern: str) -> list[Path]:
    """The regular files in the folder of `path` that match, sorted."""
    return sorted(other for other in path.parent.glob(pattern) if other.is_file())


def within(root: Path, name: Any) -> Path | None:
    """The regular file that `name` is below `root`; None where it is none, or would lie elsewhere.

    A user may link a run, and a folder in it, to another disk. Deeper no link is followed.
    """
    parts = name.split("/") if isinstance(name, str) and len(name) < 4096 else []
    if not parts or "\0" in name or any(part in ("", ".", "..") for part in parts):
        return None
    path = root
    try:
        for depth, part in enumerate(parts):
            path = path / part
            if path.is_symlink() and (depth or len(parts) == 1):
                return None
        return path if path.is_file() else None
    except OSError:
        return None


def _depth_over(tree: Any, most: int) -> bool:
    level = [tree] if type(tree) in _NODES else []
    for _ in range(most):
        children = (node.values() if type(node) is dict else node for node in level)
        level = [child for some in children for child in some if type(child) in _NODES]
        if not level:
            return False
    return True


def _not_regular(path: str) -> OSError:
    return OSError(errno.EINVAL, "is not a regular file", path)
