"""The folder of a run's checkpoints: which are complete, which stay. Imports no torch."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from dtrain import faults
from dtrain.files import read_bytes

COMPLETE = "step-*[0-9]"
LARGEST = 1 << 29  # bytes of a manifest or an index
_NAME = re.compile(r"step-[0-9]{1,16}")


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest first: a name without `.partial` was given after every byte was durable."""
    found = [p for p in directory.glob(COMPLETE) if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=step_of)


def manifest_hash(path: Path) -> str:
    """The hash of a complete checkpoint's manifest, which names all that the checkpoint holds by hash."""
    return hashlib.sha256(read_bytes(path / "manifest.json", LARGEST, follow=False)).hexdigest()


def remove_partial(directory: Path) -> None:
    """Drop what an interrupted save or removal left. Only while no writer is at work."""
    for path in directory.glob("step-*.partial"):
        _delete(path)


def surplus(steps: Iterable[int], keep_last: int, keep_every: int | None = None, best: int | None = None) -> list[int]:
    """The steps whose checkpoints go: all but the newest `keep_last`, multiples of `keep_every`, and `best`.

    keep_last is at least 1, so the newest, the one a restart needs, never goes.
    """
    assert keep_last >= 1
    steps = sorted(steps)
    return [s for s in steps[:-keep_last] if s != best and not (keep_every and s % keep_every == 0)]


def remove(path: Path) -> None:
    """Delete a complete checkpoint; a kill in the middle leaves no complete name behind."""
    going = path.with_suffix(".removed.partial")
    os.rename(path, going)
    faults.at("save:remove")
    _delete(going)


def _delete(path: Path) -> None:
    """A folder with all that is in it; of a link the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
