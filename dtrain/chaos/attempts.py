"""One attempt of a job: `dtrain train` on several ranks, forked or started by `deepspeed`, until all are gone."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

from dtrain import addresses
from dtrain.chaos.forked import fork_ranks
from dtrain.errors import DONE, HANG, STOPPED, USER_ERROR

GRACE_SECONDS = 30.0  # that the others have when a rank has failed, as `deepspeed` gives them
CLONE_NEWNS = 0x00020000  # of unshare(2): a view of the mounts of its own
LAUNCHER = Path(__file__).parent.parent.parent / "launch" / "train.py"


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    codes: list[int]  # of each rank; of the launcher, the one it passes on
    at: float  # unix seconds when nothing of it was left
    hung: bool  # it had to be ended
    left: tuple[int, ...] = ()  # ranks that did not end by themselves when another had failed
    launcher: bool = False

    @property
    def killed(self) -> bool:
        """Whether a rank died of a SIGKILL that was not sent from here; a launcher says so only by its other codes."""
        if self.launcher:
            return self.codes[0] not in (DONE, USER_ERROR, STOPPED, HANG)
        return any(code == -signal.SIGKILL and rank not in self.left for rank, code in enumerate(self.codes))

    def __str__(self) -> str:
        words = [signal.Signals(-code).name if code < 0 else f"exit {code}" for code in self.codes]
        for rank in self.left:
            words[rank] = f"still there {GRACE_SECONDS:.0f} s later"
        return ("hung, " if self.hung else "") + " / ".join(words)


def forked(
    command: EntryPoint,
    arguments: list[str],
    ranks: int,
    faults: str,
    log: Path,
    limit: float,
    alone: tuple[int, str] | None = None,
    shared_memory: int | None = None,
) -> Ended:
    """`dtrain ARGUMENTS` on `ranks` forked ranks, which print into `log`. command: the entry point of `dtrain`.

    alone: a rank and one more argument for it. shared_memory: bytes of the /dev/shm that each of them sees (root only).
    """
    environment = addresses.environment() | {"DTRAIN_FAULTS": faults, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    each = [[*arguments, alone[1]] if alone and alone[0] == rank else arguments for rank in range(ranks)]
    processes = fork_ranks(_run, [(command, own, str(log), shared_memory) for own in each], environment)
    end, failing, hung, left = time.monotonic() + limit, None, False, ()
    try:
        while alive := [rank for rank, process in enumerate(processes) if process.is_alive()]:
            now = time.monotonic()
            if failing is None and any(process.exitcode for process in processes):
                failing = now + GRACE_SECONDS
            if not hung and not left and now > min(end, failing or end):
                hung = failing is None
                left = () if hung else tuple(alive)
                for rank in alive:
                    processes[rank].kill()
            processes[alive[0]].join(0.02)
    finally:
        for process in processes:  # some are left only where the caller itself is being ended
            process.kill()
            process.join()
    return Ended([process.exitcode for process in processes], time.time(), hung, left)


def launched(arguments: list[str], ranks: int, faults: str, log: Path, limit: float) -> Ended:
    """The same through `deepspeed`, as people start it."""
    from dtrain.distributed import free_port

    program = Path(sys.executable).parent / "deepspeed"
    environment = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= addresses.environment() | {"DTRAIN_FAULTS": faults, "OMP_NUM_THREADS": "1"}
    command = [program, "--num_accelerators", str(ranks), "--master_port", str(free_port()), LAUNCHER, *arguments[1:]]
    with open(log, "ab") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    hung = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        hung = True
    finally:
        _end_session(process)
    return Ended([process.wait()], time.time(), hung, launcher=True)


def _end_session(process: subprocess.Popen) -> None:
    """Nothing that the launcher started, ranks are in its session, outlives it or holds a lock when this returns."""
    while alive := _alive_in_session(process.pid):
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _alive_in_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state not in "ZX":
                found.append(int(entry.name))
    return found


def _run(command: EntryPoint, arguments: list[str], log: str, shared_memory: int | None) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if shared_memory is not None:
        own_shared_memory(shared_memory)
    sys.argv = ["dtrain", *arguments]
    command.load()()


def own_shared_memory(size: int | str) -> None:
    """Give this process, and those it forks from now on, a /dev/shm of their own. size: as tmpfs takes it, such as 2m.

    Takes root. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)
