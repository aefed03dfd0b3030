"""Ranks meet at rank 0's store before their process group exists, so that none waits for one that has already failed.

Each rank says that it is here, or why it cannot come. Whoever waits says for whom after some seconds, and leaves as
soon as one cannot come.
"""

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

from dtrain.credentials import redacted
from dtrain.errors import SharedError, UserError
from dtrain.terminal import tell

PATIENCE = 10.0  # seconds before a rank says for whom it waits
ANSWER = 45.0  # seconds that a rank which cannot come tries to say so: the others may still be importing
_POLL = 0.1  # seconds, of rank 0; others ask less often, for there may be a thousand


def meet(rank: int, size: int, timeout: timedelta):
    """The store that all ranks have reached. Raises SharedError where one cannot come, UserError where one does not.

    torch.distributed.DistNetworkError where rank 0 cannot listen at MASTER_PORT.
    """
    store = _open(rank, size, timeout)
    store.set(f"here/{rank}", socket.gethostname())
    store.add("arrived", 1)
    began, said = time.monotonic(), False
    while store.add("arrived", 0) < size:
        _raise_failure(store, rank)
        waited = time.monotonic() - began
        if rank == 0 and waited > PATIENCE and not said:
            said = True
            _say(f"waiting for {_listed(_missing(store, size))} of {size} at {_place()}")
        if waited > timeout.total_seconds():
            raise UserError(f"{_listed(_missing(store, size))} of {size} did not come to {_place()}; see their output")
        time.sleep(_POLL if rank == 0 else 5 * _POLL)
    _raise_failure(store, rank)
    return store


def cannot_come(rank: int, size: int, why: str) -> None:
    """Tell the ranks that wait, before there is a group, that this one ends and why; rank 0 says it for all.

    Prints it here where no rank 0 is to be found. Waits until the others know, for some seconds.
    """
    host, line = socket.gethostname(), " ".join(why.split())
    if rank == 0:
        _say(line)
    try:
        store = _open(rank, size, timedelta(seconds=ANSWER), quietly=True)
        store.set(f"failed/{rank}", f"{host}\n{line}")
        store.add("failures", 1)
        _part(store, rank, size, {line} if rank == 0 else set())
    except (UserError, RuntimeError, OSError):  # torch's network errors are RuntimeErrors
        if rank != 0:
            _say(f"rank {rank} of {size} on {host}: {line}")


def _part(store, rank: int, size: int, said: set[str]) -> None:
    """Leave once all know: rank 0 last, for the store goes with it. It says what others met that it did not."""
    store.add("parting", 1)
    if rank != 0:
        return
    end = time.monotonic() + ANSWER
    while time.monotonic() < end:
        _say_others(store, size, said)
        if store.add("parting", 0) >= size:
            break
        time.sleep(_POLL)
    _say_others(store, size, said)


def _say_others(store, size: int, said: set[str]) -> None:
    for rank, (host, line) in _failures(store, size).items():
        if line not in said:
            said.add(line)
            _say(f"rank {rank} of {size} on {host}: {line}")


def _failures(store, size: int) -> dict[int, tuple[str, str]]:
    """Rank → (host, why) of the first of those that cannot come; they are asked for one by one only where one is."""
    if not store.add("failures", 0):
        return {}
    failed = [rank for rank in range(size) if store.check([f"failed/{rank}"])]
    return {rank: tuple(store.get(f"failed/{rank}").decode().split("\n", 1)) for rank in failed}


def _raise_failure(store, rank: int) -> None:
    size = int(os.environ["WORLD_SIZE"])
    if failures := _failures(store, size):
        first, (host, line) = next(iter(failures.items()))
        _part(store, rank, size, {line})
        raise SharedError(line if first == 0 else f"rank {first} of {size} on {host}: {line}")


def _missing(store, size: int) -> list[int]:
    return [rank for rank in range(size) if not store.check([f"here/{rank}"])]


def _listed(ranks: list[int]) -> str:
    """`rank 3`, `ranks 1–3`, `ranks 1, 4–6`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _open(rank: int, size: int, timeout: timedelta, quietly: bool = False):
    """Rank 0 listens, or a torchrun does for all; the others wait for that without torch's own warnings."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not listens:
        _await_listener(address, port, rank, size, timeout, quietly)
    return TCPStore(address, port, size, listens, timeout, wait_for_workers=False, multi_tenant=True)


def _await_listener(address: str, port: int, rank: int, size: int, timeout: timedelta, quietly: bool) -> None:
    """Raises UserError where nobody listens within the time-out."""
    began, said = time.monotonic(), quietly
    while True:
        with suppress(OSError), socket.create_connection((address, port), timeout=5):
            return
        waited = time.monotonic() - began
        if waited > timeout.total_seconds():
            raise UserError(
                f"rank {rank} of {size} found no rank 0 at {_place()} in {waited:.0f} s; see rank 0's output"
            )
        if waited > PATIENCE and not said:
            said = True
            _say(f"rank {rank} of {size} on {socket.gethostname()}: waiting for rank 0 at {_place()}")
        time.sleep(5 * _POLL)


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _say(line: str) -> None:
    tell(redacted(line))
