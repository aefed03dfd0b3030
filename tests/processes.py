"""The processes of this machine, as /proc lists them."""

import multiprocessing
import os
from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that any thread of this one started and that have not ended."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def processes_of(folder: Path) -> list[int]:
    """Every process of a launch: launcher, node launcher, ranks and loader workers, found by their working folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def worker_pids() -> list[int]:
    """The processes that this one started through multiprocessing and that have not ended."""
    return [child.pid for child in multiprocessing.active_children()]
