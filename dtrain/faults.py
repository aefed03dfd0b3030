"""Faults on purpose: what the environment asks for happens at named points, so that surviving it can be proved.

DTRAIN_FAULTS holds a schedule, several faults separated by `;`:

    DTRAIN_FAULTS="sigkill at=save:write step=40 rank=1 attempt=1; nan images=2400:2424"

    sigkill | sigkill_all | sigterm    this rank, all ranks on this machine, this rank politely
    sigkill_workers                    the processes that make this rank's batches
    stall                              this thread sleeps for `seconds`, else for ever
    nan                                the loss of a batch with some of images [a, b) of the run's order is NaN,
                                       or, at=eval:features, a block's features are not
    fill, free                         a file at `path` takes all that is left of a small file system; it is gone again

at: one of POINTS. step: of the training, or that a save or an evaluation belongs to; default: any. rank: default: each.
attempt: counts from 1, so that a run that goes on is not hit again; default: every one. skip: how often the point is
passed first. times: how often it happens, by this process; default: once, and `nan` always. Without the variable a
point costs one look at an empty tuple.
"""

import errno
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import threading
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

from dtrain.errors import UserError

POINTS = {
    "load": "a checkpoint is opened, before its tensors are read",
    "load:done": "this rank has loaded it",
    "step": "before a step's batch is taken",
    "step:update": "gradients are there, the weights have not moved",
    "step:moved": "weights, moments and averages have moved, no other rank knows it yet",
    "save:stage": "before each piece is copied",
    "save:write": "after each half of a block of the rank's file",
    "save:fsync": "the file is written, not yet durable",
    "save:index": "the file is durable, its index is not written",
    "save:rename": "an index or the manifest has its temporary name",
    "save:written": "this rank's part is durable",
    "save:commit": "all parts are durable, the manifest is not written",
    "save:manifest": "the manifest is durable, the checkpoint's name still ends in .partial",
    "save:replace": "a damaged checkpoint of the same step has given up its name",
    "save:committed": "the checkpoint has its name, the folder is not durable",
    "save:journal": "the checkpoint is durable, the journal does not know",
    "save:averages": "the averages of an old checkpoint are written for themselves, their folder has no name yet",
    "save:remove": "an old checkpoint has given up its name and is not yet deleted",
    "eval": "before an evaluation",
    "eval:draw": "before each block of samples",
    "eval:features": "a block's features are there",
    "eval:journal": "before its line is written",
}
KINDS = ("sigkill", "sigkill_all", "sigkill_workers", "sigterm", "stall", "nan", "fill", "free")
FEATURES = "eval:features"
MOST_FILLED = 2**30  # bytes; the disk that others work on is not filled by mistake


@dataclass
class Fault:
    """One fault of a schedule; the fields are the words of its text."""

    kind: str
    at: str | None = None
    step: int | None = None
    rank: int | None = None
    attempt: int | None = None
    skip: int = 0
    times: float = 1
    seconds: float = math.inf
    images: tuple[int, int] | None = None
    path: str | None = None
    _passed: int = field(default=0, repr=False)  # how often this process has met the point
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Raises UserError."""
        kind, *words = shlex.split(text)
        values = dict(word.partition("=")[::2] for word in words)
        types = {f.name: f.type for f in fields(cls) if not f.name.startswith("_") and f.name != "kind"}
        try:
            if kind not in KINDS:
                raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
            if unknown := values.keys() - types.keys():
                raise ValueError(f"{sorted(unknown)[0]!r} is none of {', '.join(types)}")
            if "images" in values:
                first, last = values["images"].split(":")
                values["images"] = (int(first), int(last))
            for name in values.keys() & {"step", "rank", "attempt", "skip", "times"}:
                values[name] = int(values[name])
            if "seconds" in values:
                values["seconds"] = float(values["seconds"])
            if kind == "nan" and values.get("at") != FEATURES:
                if values.keys() & {"at", "step"} or "images" not in values:
                    raise ValueError(f"nan takes images=FIRST:LAST instead of a point, or at={FEATURES}")
                values.setdefault("times", math.inf)
            elif kind in ("fill", "free") and "path" not in values:
                raise ValueError(f"{kind} takes path=FILE")
            elif values.get("at") not in POINTS:
                raise ValueError(f"at={values.get('at')} is none of {', '.join(POINTS)}")
        except ValueError as e:
            raise UserError(f"DTRAIN_FAULTS: in {text.strip()!r}: {e}") from None
        return cls(kind, **values)

    def __str__(self) -> str:
        parts = [self.kind]
        for f in fields(self)[1:]:
            value = getattr(self, f.name)
            if f.name.startswith("_") or value == f.default or (f.name == "times" and value == math.inf):
                continue
            parts.append(f"{f.name}={value[0]}:{value[1]}" if f.name == "images" else f"{f.name}={value}")
        return shlex.join(parts)

    def due(self) -> bool:
        """Called each time its point is met: whether it happens this time."""
        with self._lock:
            self._passed += 1
            return self.skip < self._passed <= self.skip + self.times


_faults: tuple[Fault, ...] = ()  # of this rank and attempt
_pids: list[int] = []  # of all ranks on this machine, this one last
_steps: dict[str, int] = {}  # by the part of a point's name before the colon: the step given last


def scheduled() -> str | None:
    """The schedule that the environment holds, for whoever reads of this run; None without."""
    return os.environ.get("DTRAIN_FAULTS", "").strip() or None


def arm(rank: int, attempt: int, pids: list[int]) -> None:
    """From now on this process has the faults that the environment schedules for this rank and attempt.

    pids: of all ranks on this machine. Raises UserError for a schedule that cannot be read.
    """
    global _faults, _pids
    texts = os.environ.get("DTRAIN_FAULTS", "").split(";")
    found = [Fault.parse(text) for text in texts if text.strip()]
    _faults = tuple(f for f in found if f.rank in (None, rank) and f.attempt in (None, attempt))
    _pids = sorted(pids, key=lambda pid: pid == os.getpid())
    _steps.clear()


def at(point: str, step: int | None = None) -> None:
    """The program is at `point`, of `step`; without one, of the step that a point of the same group gave last."""
    if _faults:
        _met(point, step)


def poisons(first: int, last: int) -> bool:
    """Whether the loss of images [first, last) of the run's order is to be not a number on this rank."""
    due = [f.due() for f in _faults if f.images and f.images[0] < last and first < f.images[1]]
    return any(due)


def spoils(point: str) -> bool:
    """Whether what this rank has computed at `point` is to be not a number."""
    due = [f.due() for f in _faults if f.kind == "nan" and f.at == point and f.step in (None, _step(point))]
    return any(due)


def _step(point: str) -> int | None:
    return _steps.get(point.partition(":")[0])


def _met(point: str, step: int | None) -> None:
    if step is not None:
        _steps[point.partition(":")[0]] = step
    for fault in _faults:
        if fault.at == point and fault.step in (None, _step(point)) and fault.due():
            _happen(fault)


def _happen(fault: Fault) -> None:
    if fault.kind == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "sigkill_all":
        for pid in _pids:
            os.kill(pid, signal.SIGKILL)
    elif fault.kind == "sigkill_workers":
        for worker in multiprocessing.active_children():
            worker.kill()
    elif fault.kind == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault.kind == "stall":
        end = time.monotonic() + fault.seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
    elif fault.kind == "fill":
        _fill(Path(fault.path))
    elif fault.kind == "free":
        Path(fault.path).unlink(missing_ok=True)


def _fill(path: Path) -> None:
    assert shutil.disk_usage(path.parent).free <= MOST_FILLED, f"{path.parent} is no small file system"
    with open(path, "ab", buffering=0) as f:
        for size in (2**20, 2**12, 1):
            block = bytes(size)
            try:
                while True:
                    f.write(block)
            except OSError as e:
                if e.errno != errno.ENOSPC:
                    raise
