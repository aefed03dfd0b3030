"""Batches that are made ahead wait in /dev/shm: how much of it they take, and whether it is there. Imports no torch.

Containers have 64 MiB of it unless they are started with more, and a batch of latents or large pictures is more.
"""

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from math import ceil
from pathlib import Path

from dtrain import distributed
from dtrain.config import Config
from dtrain.data.declared import declared
from dtrain.errors import UserError

PLACE = Path("/dev/shm")
PREFETCH = 2  # batches that a worker makes ahead
MOST_WORKERS = 8  # of a rank that are started without being asked for: a GPU's step seldom wants more
PAGE = 4096
MIB, GIB = 2**20, 2**30


def loader_processes(config: Config, world_size: int, ranks: int) -> int:
    """How many each of `ranks` ranks on this machine has: data.workers.

    Where that is null, the cores that this process may use are shared among the ranks, one of each share is left to the
    step, and no more are taken than have room in half of /dev/shm; at least 1, at most MOST_WORKERS.
    """
    if config.data.workers is not None:
        return config.data.workers
    batch, room = of_batch(config, world_size), size() // 2
    fitting = [n for n in range(1, MOST_WORKERS + 1) if of_ranks(ranks, n, batch) <= room]
    return max(1, min(distributed.cores() // ranks - 1, len(fitting)))


def of_ranks(ranks: int, workers: int, batch: int) -> int:
    """Bytes that `ranks` ranks on one machine take of it at most, with `workers` each and `batch` bytes a batch.

    Every batch that the workers have made ahead, the one that the step is at, and the locks of their queues.
    """
    locks = PAGE * (8 + 3 * workers) if workers else 0
    return ranks * (batches(workers) * batch + locks)


def batches(workers: int) -> int:
    """How many of one rank are there at the same time."""
    return PREFETCH * workers + 1 if workers else 0


def of_batch(config: Config, world_size: int) -> int:
    """Bytes of one rank's batch."""
    return columns_bytes(ceil(config.data.batch_size / world_size), declared(config).row_bytes)


def columns_bytes(rows: int, row_bytes: Iterable[int]) -> int:
    """Bytes of a batch whose tensors have so many bytes a row, each tensor in whole pages."""
    return sum(PAGE * ceil(rows * column / PAGE) for column in row_bytes)


def pictures_bytes(rows: int, channels: int, side: int) -> int:
    """Bytes of a batch of pictures with labels: what `declared` says of a config that is still to be written."""
    return columns_bytes(rows, [channels * side**2, 1, 8, 8, 8, 8])  # image, mirrored, k, label, time, drop


def free() -> int:
    """Bytes that this process could still take; 0 where there is no /dev/shm."""
    try:
        found = os.statvfs(PLACE)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def size() -> int:
    """Bytes that all processes together can take: the same whatever other ranks have taken. 0 without /dev/shm."""
    try:
        found = os.statvfs(PLACE)
    except OSError:
        return 0
    return found.f_blocks * found.f_frsize


def check(config: Config, world_size: int, ranks: int) -> None:
    """Raises UserError where this machine has too little for its `ranks` ranks."""
    workers, batch = loader_processes(config, world_size, ranks), of_batch(config, world_size)
    needed, there = of_ranks(ranks, workers, batch), free()
    if there < needed:
        raise UserError(f"{shown(ranks, workers, batch, there)}: {advice(needed)}")


def shown(ranks: int, workers: int, batch: int, there: int) -> str:
    """What there is and what is taken, in words; the numbers as of `of_ranks`."""
    needed = of_ranks(ranks, workers, batch)
    each = f"{batches(workers)} of {batch / MIB:,.1f} MiB for each of {ranks} ranks"
    return (
        f"/dev/shm of {socket.gethostname()} has {there / MIB:,.1f} MiB free, and batches made ahead take up to "
        f"{needed / MIB:,.1f} MiB ({each})"
    )


def advice(needed: int) -> str:
    """How there is more, or less is needed."""
    return (
        f"give the container more, as with --shm-size={ceil(2 * needed / GIB)}g or --ipc=host, or take data.workers=0"
    )


def full(problem: str) -> str:
    """Why a worker could not put its batch there. problem: as the system says it.

    There was room at the start, so it is the surroundings that have changed: starting again may do.
    """
    return (
        f"/dev/shm of {socket.gethostname()} is full ({problem}), so a data worker could not hand over its batch: "
        "see what else lies there, give the container more, as with --shm-size=8g or --ipc=host, or take data.workers=0"
    )


def remove_left(pid: int) -> None:
    """Remove what a process that failed or died in the middle of sharing a tensor has left there."""
    for path in PLACE.glob(f"torch_{pid}_*"):
        with suppress(OSError):
            path.unlink()
