"""Rank, world size, device, thread counts, and the few collectives others use.

Everything reads the environment that launchers set (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), so the same code
runs alone, under `deepspeed` and under srun.
"""

import ctypes
import os
import random
import re
import socket
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

FIRST_PORT = 10_000  # below it well-known services listen


def rank() -> int:
    return _number("RANK", 0)


def world_size() -> int:
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """How many ranks share this machine (DeepSpeed's launcher calls it LOCAL_SIZE)."""
    return _number("LOCAL_WORLD_SIZE", 0) or _number("LOCAL_SIZE", 0) or world_size()


def _number(name: str, default: int) -> int:
    """The number that a variable begins with: `4,2` of OMP_NUM_THREADS is 4 for the outermost level, and `2(x2)` of
    SLURM is 2 on each of two nodes. What must be a number is checked by `launcher.adopt`.
    """
    match = re.match(r"\s*(\d+)", os.environ.get(name, ""))
    return int(match[1]) if match else default


def cores() -> int:
    """Those that this process may use; of a SLURM job's where SLURM has counted but not bound them."""
    bound = len(os.sched_getaffinity(0))
    return min(bound, _number("SLURM_CPUS_PER_TASK", 0) or bound)


def set_thread_counts() -> None:
    """Give each local rank its share of the cores, unless the user has set OMP_NUM_THREADS (design, decision 10).

    The launcher sets OMP_NUM_THREADS=1 itself where it was unset; that counts as not set when a rank has more cores.
    """
    import torch

    share = max(1, cores() // local_world_size())
    asked = _number("OMP_NUM_THREADS", 0)
    torch.set_num_threads(asked if asked > 1 else share)


# What a user tells glibc's malloc about the same, by a variable of its own or in GLIBC_TUNABLES.
MALLOC_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
MALLOC_TUNABLES = re.compile(r"(^|:)glibc\.malloc\.(mmap_max|mmap_threshold|trim_threshold|top_pad)=")
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, unless the user has told it otherwise.

    By default it gives large blocks back to the system and has every page of the next one zeroed again, which costs
    EfficientNet's features half of their time, and a JPEG's decoder a fifth.
    """
    if (libc := _malloc()) is not None:
        libc.mallopt(MMAP_THRESHOLD, 32 * 2**20)  # the largest it takes
        libc.mallopt(TRIM_THRESHOLD, 2**29)
        libc.mallopt(TOP_PAD, 2**24)


def keep_all_freed_memory() -> None:
    """On the CPU, before the first step and after what lies between steps: what is free now goes back to the system,
    and from then on every block, of whatever size, is kept for the next tensors.

    ZeRO's flat tensors and the temporaries of a step are above the largest threshold of `keep_freed_memory`, and come
    again in every step. The state of the training has been allocated by then, outside of what is kept.
    """
    import torch

    if not torch.cuda.is_available() and (libc := _malloc()) is not None:
        libc.malloc_trim(0)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, -1)  # never


def _malloc():
    """The C library, where it is glibc and nobody has told it what to keep."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    if any(map(os.environ.get, MALLOC_VARIABLES)) or MALLOC_TUNABLES.search(os.environ.get("GLIBC_TUNABLES", "")):
        return None
    return libc


def prepare() -> None:
    """Threads and memory of a process that is about to compute."""
    import torch

    set_thread_counts()
    if not torch.cuda.is_available():
        keep_freed_memory()


def free_port() -> int:
    """A TCP port of this machine that is free, and is likely to be free yet when somebody listens at it.

    It is not one of those that the system gives to outgoing connections, where there are others.
    """
    drawn = random.SystemRandom()
    ports = range(FIRST_PORT, _first_outgoing_port())
    for port in [drawn.choice(ports) for _ in range(20 if ports else 0)] + [0]:
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return s.getsockname()[1]
    raise OSError("no TCP port is free")


def _first_outgoing_port() -> int:
    """By default 32768 on Linux, 49152 elsewhere."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 49152


def device():
    """The torch device this rank computes on."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def initialize(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group; alone, form a group of one. Idempotent.

    The time-out is long because ranks wait for each other's evaluation; a hang is found by other means. Raises
    UserError on rank 0 where the port to meet at is taken; the others wait for a rank 0 until their launcher ends them.
    Raises SharedError where a rank could not come (`rendezvous`).
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if world_size() == 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    where = device()
    try:
        meeting = {}
        if world_size() > 1:
            from dtrain.rendezvous import meet

            store = dist.PrefixStore("group", meet(rank(), world_size(), timeout))
            meeting = {"store": store, "rank": rank(), "world_size": world_size()}
        if where.type == "cpu":
            dist.init_process_group("gloo", timeout=timeout, **meeting)
            return
        torch.cuda.set_device(where)
        dist.init_process_group("nccl", timeout=timeout, device_id=where, **meeting)
    except dist.DistNetworkError as e:
        if "EADDRINUSE" not in str(e):
            raise
        raise _port_taken() from None


def _port_taken():
    """The error of a rank 0 that cannot listen at MASTER_PORT."""
    from dtrain.errors import UserError

    port = os.environ["MASTER_PORT"]
    return UserError(
        f"port {port} of {socket.gethostname()}, where the ranks would meet, is taken, by another training perhaps; "
        f"give this one another: deepspeed --master_port {free_port()} ..."
    )


def has_met() -> bool:
    """Whether this process is in a process group; asked without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def cannot_come(why: str) -> bool:
    """Before there is a group, say on rank 0's terminal why this rank ends, and let no other wait for it.

    Whether it was said: there is nobody to tell where this process is alone, or the ranks have met already.
    """
    if world_size() == 1 or not os.environ.get("MASTER_ADDR") or not os.environ.get("MASTER_PORT", "").isdigit():
        return False
    if has_met():
        return False
    from dtrain import rendezvous

    rendezvous.cannot_come(rank(), world_size(), why)
    return True


def barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def gather_objects(thing) -> list:
    """Every rank's `thing`, in rank order, on every rank. For small control data, not tensors."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [thing]
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, thing)
    return everything


def ranks_here() -> int:
    """How many ranks share this machine, or container, whatever the environment says of it. A collective."""
    return gather_objects(socket.gethostname()).count(socket.gethostname())


def on_rank_0(function, *args):
    """Call on rank 0 only; every rank gets its result, or raises what it met, as of `agree`."""
    result, met = None, None
    if rank() == 0:
        try:
            result = function(*args)
        except Exception as e:
            met = e
    try:
        value, said = gather_objects((result, _said(met)))[0]
        _raise_together([said], met)
    finally:
        del met  # else its traceback holds this frame, and so all that `function` held, until garbage is collected
    return value


def agree(function, *args):
    """Call on every rank; this rank's result, or an exception that all of them raise: the first that one of them met.

    SharedError, or NotFinite, for what the user can mend; SharedFailure for all else. `function` has no collective in
    it, so that every rank comes to the end of it.
    """
    result, met = None, None
    try:
        result = function(*args)
    except Exception as e:
        met = e
    try:
        _raise_together(gather_objects(_said(met)), met)
    finally:
        del met  # as in `on_rank_0`
    return result


def _said(met: Exception | None) -> tuple[type, str] | None:
    """What the other ranks raise because of it, and its message."""
    from dtrain.errors import NotFinite, SharedError, SharedFailure, UserError, message_of

    if met is None:
        return None
    if isinstance(met, UserError) or (isinstance(met, PermissionError) and met.filename is not None):
        return NotFinite if isinstance(met, NotFinite) else SharedError, message_of(met)
    where = f"rank {rank()} on {socket.gethostname()}: " if world_size() > 1 else ""
    return SharedFailure, f"{where}{type(met).__name__}: {' '.join(str(met).split())[:500]}"


def _raise_together(said: list[tuple[type, str] | None], met: Exception | None) -> None:
    """Raise the first of what ranks have said; where no user can mend it, with its cause on the rank that met it."""
    from dtrain.errors import SharedFailure

    for number, one in enumerate(said):
        if one is not None:
            kind, message = one
            raise kind(message) from (met if kind is SharedFailure and number == rank() else None)


def finalize() -> None:
    """Leave the process group, so that no rank sees another vanish."""
    import torch.distributed as dist

    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
