"""Where a network's weight file is: named by the user, in the cache, or fetched into it; never trusted unhashed."""

import fcntl
import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from dtrain.errors import UserError

TIMEOUT_SECONDS = 30.0  # of a connection that says nothing
PART = 1 << 20  # bytes read from it at a time


@dataclass(frozen=True)
class WeightFile:
    name: str
    url: str
    sha256: str


# NVIDIA's TorchScript translation of the network that the TensorFlow FID used; clean-fid takes the same file.
INCEPTION = WeightFile(
    name="inception-2015-12-05.pt",
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)


def cache_folder() -> Path:
    """~/.cache/dtrain, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtrain"


def find(file: WeightFile, given: str | None = None) -> Path | None:
    """The file of `place`, its hash checked; None for nowhere. Raises UserError, also for another hash."""
    path = place(file, given)
    return path and verified(path, file)


def place(file: WeightFile, given: str | None = None) -> Path | None:
    """Where the file lies: at `given` (`eval.weights`), else at DTRAIN_WEIGHTS, else in the cache; None for nowhere.

    `given` and DTRAIN_WEIGHTS name the file or its folder. Reads neither it nor a network. Raises UserError where a
    named file is missing.
    """
    for source, named in (("eval.weights", given), ("DTRAIN_WEIGHTS", os.environ.get("DTRAIN_WEIGHTS"))):
        if named:
            path = Path(named) / file.name if Path(named).is_dir() else Path(named)
            if not path.is_file():
                raise UserError(f"{source} names {path}, which is not there; copy {file.name} to it, from {file.url}")
            return path
    path = cache_folder() / file.name
    return path if path.is_file() else None


def verified(path: Path, file: WeightFile) -> Path:
    """`path`, when it holds exactly the bytes of `file`. Raises UserError."""
    try:
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
            size = f.tell()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if found != file.sha256:
        raise UserError(
            f"{path} ({size:,} bytes, sha256 {found[:12]}…) is not {file.name} (sha256 {file.sha256[:12]}…): it was "
            f"cut off or is another file; delete it, or copy it again from {file.url}"
        )
    return path


def obtain(file: WeightFile, given: str | None = None) -> Path:
    """`find`, or a download into the cache, by one process of the machine while the others wait. Raises UserError."""
    found = find(file, given)
    if found is not None:
        return found
    path = cache_folder() / file.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{file.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released with the descriptor, a killed process's too
            if not path.is_file():
                _download(file, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; name the file with --weights or DTRAIN_WEIGHTS") from None
    return verified(path, file)


def _download(file: WeightFile, path: Path) -> None:
    """Fetch into a temporary file beside `path`, check the hash, then rename: the name never stands for a part."""
    partial = path.with_name(f".{file.name}.{os.getpid()}")
    digest = hashlib.sha256()
    try:
        with open(partial, "wb") as out:
            for part in _parts(file, path):
                digest.update(part)
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != file.sha256:
            raise UserError(
                f"{file.url} sent {partial.stat().st_size:,} bytes with sha256 {digest.hexdigest()[:12]}…, not "
                f"{file.sha256[:12]}…: it was cut off or changed; {_by_hand(file, path)}"
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _parts(file: WeightFile, path: Path):
    try:
        with urllib.request.urlopen(file.url, timeout=TIMEOUT_SECONDS) as response:
            while part := response.read(PART):
                yield part
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as e:
        reason = getattr(e, "reason", None) or e
        raise UserError(f"cannot download {file.url} ({reason}); {_by_hand(file, path)}") from None


def _by_hand(file: WeightFile, path: Path) -> str:
    return (
        f"on a machine without internet copy {file.name} (sha256 {file.sha256}) from one that has it to {path}, "
        "or name a copy with --weights or DTRAIN_WEIGHTS"
    )
