"""One job on a run directory at a time: a lock file that names host, process and job."""

import json
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path

from dtrain import files
from dtrain.errors import UserError

HEARTBEAT_SECONDS = 20.0
DEAD_AFTER_SECONDS = 300.0  # without a heartbeat; for locks of processes out of sight: other machines', containers'


class RunLock:
    """Held from `acquire` to `release`; a daemon thread keeps the file's time fresh for other machines to see."""

    def __init__(self, path: Path):
        self.path = path
        self._mine: dict | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Raises UserError when a live job holds it, or nobody can tell who does; takes over from a dead one."""
        self._mine = _identity(os.getpid()) | _job()
        mine, unreadable = json.dumps(self._mine), 0
        while not _create(self.path, mine):
            holder = _read(self.path)
            if holder is None:  # released in this moment, or not a lock of ours: those appear whole
                if (unreadable := unreadable + 1) == 10:
                    raise UserError(f"{self.path} does not tell who holds it; remove it if no job uses this run")
                time.sleep(0.1)
                continue
            if self._alive(holder):
                job = f", job {holder['job']}" if holder.get("job") else ""
                raise UserError(
                    f"{self.path.parent} is in use by process {holder['pid']} on {holder['host']}{job}; "
                    f"wait for it, stop it with `touch {self.path.parent}/stop`, or give this run another run.name"
                )
            # Only one of several that find it dead may remove it, and nobody may remove its successor.
            claim = self.path.with_name(f".lock-of-{holder['pid']}-{holder['started']}")
            if _create(claim, mine):
                if _read(self.path) == holder:
                    self.path.unlink(missing_ok=True)
                claim.unlink(missing_ok=True)
            else:
                _forget_if_left(claim)
                time.sleep(0.1)
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def release(self) -> None:
        if not self._released.is_set():
            self._released.set()
            # Another may have taken it, after this process was frozen for long.
            if self._mine is not None and _read(self.path) == self._mine:
                self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                return  # the run directory is gone
            except OSError:
                continue  # a file system that is away for a moment

    def _alive(self, holder: dict) -> bool:
        if holder.get("boot") == _boot() and holder.get("namespace") == _namespace():
            return _identity(holder["pid"]).get("started") == holder.get("started")
        if holder.get("boot") != _boot() and holder.get("host") == socket.gethostname():
            return False  # this machine, before it was started anew
        job = _job()
        if job["job"] and holder.get("job") == job["job"] and holder.get("restarts") != job["restarts"]:
            return False  # this job before it was requeued: SLURM has killed every process of it
        try:
            return time.time() - self.path.stat().st_mtime < DEAD_AFTER_SECONDS
        except FileNotFoundError:
            return False


def holder(path: Path) -> dict | None:
    """Who holds this lock now: {"host", "pid", "job", …}; None where nobody alive does."""
    found = _read(path)
    return found if found is not None and RunLock(path)._alive(found) else None


def _create(path: Path, text: str) -> bool:
    """Write a new file whole; False where there is one. A hard link appears with its contents, or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_text(text)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _forget_if_left(claim: Path) -> None:
    """A claim is held for milliseconds: one that is older was left by a process that died with it."""
    try:
        if time.time() - claim.stat().st_mtime > HEARTBEAT_SECONDS:
            claim.unlink()
    except FileNotFoundError:
        pass


def _read(path: Path) -> dict | None:
    """What a lock file says; None where there is none, or one that is not of the form that `_identity` gives it."""
    try:
        found = files.read_json(path)
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not {"host", "pid", "started"} <= found.keys():
        return None
    pid, started = found["pid"], found["started"]  # they name a file of /proc, and a claim
    numbered = type(pid) is int and 0 < pid < 1 << 31 and re.fullmatch(r"[0-9]{1,30}", str(started))
    texts = all(value is None or isinstance(value, str) for key, value in found.items() if key != "pid")
    return found if numbered and texts and found["host"] else None


def _identity(pid: int) -> dict:
    """What tells a process from another that gets its number later; `started` is absent when there is none."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return {}
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "namespace": _namespace(),
        "pid": pid,
        "started": started,
    }


def _job() -> dict:
    """The SLURM job this process belongs to, and how often it was requeued; None where it belongs to none."""
    return {"job": os.environ.get("SLURM_JOB_ID"), "restarts": os.environ.get("SLURM_RESTART_COUNT")}


def _namespace() -> str:
    """Within which process numbers mean something: containers on one machine have one each."""
    return os.readlink("/proc/self/ns/pid")


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
