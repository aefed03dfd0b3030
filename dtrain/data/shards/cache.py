"""A block cache on local disk, shared by all processes of a node and safe against kills.

A block is one file, written beside its place and renamed into it, so a reader finds a block whole or not at all. What
a block holds is checked by the members' crc32 when they are read out of it (`reader.py`).
"""

import fcntl
import hashlib
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from dtrain.config import Data
from dtrain.data.shards.remote import is_url
from dtrain.errors import UserError
from dtrain.files import open_regular

BLOCK = 256 * 1024  # bytes: small samples are read near-sequentially, large ones cost at most two blocks too many
_FRESH = 60  # seconds within which a use is not noted again
_STALE = 3600  # seconds after which an unfinished file was left by a kill


def default_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtrain"


def cache_of(data: Data, place: str | Path) -> "BlockCache | None":
    """The cache that shards at `place` go through in a run; None for a folder."""
    return BlockCache(data.cache_dir, data.cache_bytes) if is_url(place) else None


class BlockCache:
    """Blocks by (key, number), the least recently used of them deleted where they take more than `limit` bytes.

    Sizes are summed once every limit / 64 bytes that a process writes: n writers may pass the limit by n / 64 of it.
    """

    def __init__(self, directory: str | Path | None, limit: int):
        self.directory = Path(directory) if directory else default_directory()
        self.limit = limit
        self._unswept = limit  # so that the first block written looks at what earlier processes left
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot make data.cache_dir {self.directory}: {e.strerror}; name another") from None

    def path(self, key: str, block: int | str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self.directory / name[:2] / f"{name}-{block}"

    def read(self, key: str, block: int | str, size: int, start: int, stop: int) -> bytes | None:
        """Bytes start..stop of a block of `size` bytes; None where it is not there, not whole or cannot be read."""
        try:
            descriptor = open_regular(self.path(key, block))
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            if status.st_size != size:
                return None
            if time.time() - status.st_mtime > _FRESH:
                with suppress(OSError):  # another user's block may be read and not touched
                    os.utime(descriptor)
            data = os.pread(descriptor, stop - start, start)
            return data if len(data) == stop - start else None
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def has(self, key: str, block: int | str, size: int) -> bool:
        try:
            return self.path(key, block).stat().st_size == size
        except OSError:
            return False

    def write(self, key: str, block: int | str, data: bytes) -> None:
        self.fill(key, block, lambda path: path.write_bytes(data))

    def fill(self, key: str, block: int | str, make) -> None:
        """Let `make(path)` write a file and take it in as a block."""
        place = self.path(key, block)
        temporary = place.with_name(f".{secrets.token_hex(8)}.tmp")  # other machines may have the same process numbers
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            make(temporary)
            self._unswept += temporary.stat().st_size
            os.replace(temporary, place)
        except OSError as e:
            raise UserError(
                f"cannot write to data.cache_dir {self.directory}: {e.strerror}; make room or lower data.cache_bytes"
            ) from None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if self._unswept > self.limit / 64:
            self._unswept = 0
            with suppress(OSError):  # what is another user's is his to sweep
                self._sweep()

    def drop(self, key: str, block: int | str) -> None:
        with suppress(OSError):
            self.path(key, block).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete what has not been used for longest until four fifths of the limit are left; one process at a time."""
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another process is at it
            now, files = time.time(), []
            for folder in os.scandir(self.directory):
                if not folder.is_dir(follow_symlinks=False) or len(folder.name) != 2:
                    continue
                for entry in os.scandir(folder.path):
                    with suppress(OSError):
                        status = entry.stat()
                        if not entry.name.startswith("."):
                            files.append((status.st_mtime, status.st_size, entry.path))
                        elif now - status.st_mtime > _STALE:
                            os.unlink(entry.path)
            total = sum(size for _, size, _ in files)
            if total <= self.limit:
                return
            for _, size, path in sorted(files):
                with suppress(OSError):
                    os.unlink(path)
                total -= size
                if total <= self.limit * 4 // 5:
                    return
        finally:
            os.close(descriptor)
