"""Files that are there whole or not at all, and what a thing's name is as a file's."""

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

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
