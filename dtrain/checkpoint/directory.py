"""The folder of a run's checkpoints: which are complete, which stay. Imports no torch."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from dtrain import faults

COMPLETE = "step-*[0-9]"


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest first: a name without `.partial` was given after every byte was durable."""
    found = [p for p in directory.glob(COMPLETE) if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def manifest_hash(path: Path) -> str:
    """Of a complete checkpoint: its manifest names all that the checkpoint holds by hash."""
    return hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()


def remove_partial(directory: Path) -> None:
    """Drop what an interrupted save or removal left. Only while no writer is at work."""
    for path in directory.glob("step-*.partial"):
        shutil.rmtree(path)


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
    shutil.rmtree(going)
