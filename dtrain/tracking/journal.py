"""The journal: what happened in a run, one JSON object a line, append-only and never cut (design, decision 6).

    {"event": "train", "step": 10, "images": 1280, "attempt": 1, "time": 1.7e9, "metrics": {"loss": 0.9}, "context": {}}

It is the truth that curves, reports and MLflow are made from, so it needs nothing but a file: no torch, no mlflow.
A line counts when its newline is there. An `attempt` line says where a resume went on: what earlier attempts wrote past
that step is void, because the run goes through those steps again. Strict JSON has no NaN: in `metrics`, where every
value is a number, non-finite ones are the strings "NaN", "Infinity" and "-Infinity", and readers give floats back.

A file has one writer, because two machines on one file system would overwrite each other's lines. So what others know
of a run lies beside rank 0's journal.jsonl, in the same form:

    journal-rank-N.jsonl       rank N: what rank 0 cannot know, such as bad samples
    journal-eval-WHO.jsonl     an evaluation of one of its checkpoints, also while the training goes on
    system-rank-N.jsonl        how busy the node of rank N is
    sweep.jsonl                an evaluation for every setting of a sweep
"""

import errno
import json
import math
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
SYNCED = {"attempt", "checkpoint", "eval", "eval_failed"}  # worth an fsync: rare, and decisions are taken by them
EVALUATIONS, SYSTEM, SWEEP = "journal-eval-*.jsonl", "system-rank-*.jsonl", "sweep.jsonl"
NEVER_VOID = {"system", "sweep"}  # true of the machines, or of a checkpoint, whatever steps are gone through again
_FIELDS = {
    "event": str,
    "step": int,
    "images": int,
    "attempt": int,
    "time": (int, float),
    "metrics": dict,
    "context": dict,
}


class Journal:
    """The writing end, one for each rank that has something to say; the file appears with the first line.

    `path` is rank 0's file, journal.jsonl; rank N writes journal-rank-N.jsonl beside it. `attempt` is the number that
    lines carry: set by `begin_attempt` (on other ranks by the caller), else the highest in the file, so that an
    evaluation after training belongs to the last attempt.
    """

    def __init__(self, path: str | Path, rank: int = 0):
        path = Path(path)
        self.path = path.with_name(f"{path.stem}-rank-{rank}{path.suffix}") if rank else path
        self.attempt: int | None = None
        self._descriptor: int | None = None
        self._torn = False  # the file does not end with a newline

    def begin_attempt(
        self, step: int, images: int, context: dict[str, Any] | None = None, number: int | None = None
    ) -> int:
        """Open the next attempt, which goes on after `step`; its number, where it is known already. Raises OSError."""
        self.attempt = number or highest_attempt(events(self.path)) + 1
        self.append("attempt", step, images, context=context)
        return self.attempt

    def append(
        self,
        event: str,
        step: int,
        images: int,
        metrics: dict[str, float] | None = None,
        context: dict[str, Any] | None = None,
    ) -> None:
        """Write one line. `metrics` holds numbers of any kind that `float` takes; `context` is plain JSON data.

        Raises OSError when the line did not reach the file whole (a full disk); the next line then starts on its own.
        """
        if self.attempt is None:
            self.attempt = highest_attempt(events(self.path))
        self._write(self._line(event, step, images, metrics or {}, context or {}), event in SYNCED)

    def _line(self, event: str, step: int, images: int, metrics: dict, context: dict) -> bytes:
        line = {
            "event": event,
            "step": int(step),
            "images": int(images),
            "attempt": self.attempt,
            "time": round(time.time(), 3),
            "metrics": {name: _number(value) for name, value in metrics.items()},
            "context": context,
        }
        return json.dumps(line, allow_nan=False).encode() + b"\n"

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, line: bytes, synced: bool) -> None:
        """One write to a descriptor in append mode, so that no other process can split the line. A SIGKILL can, where a
        page of the file ends; an attempt's last line is then torn, and the next attempt's starts on its own.

        synced: wait until it is durable too.
        """
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            end = os.fstat(self._descriptor).st_size
            self._torn = end > 0 and os.pread(self._descriptor, 1, end - 1) != b"\n"
        data = b"\n" + line if self._torn else line
        written = os.write(self._descriptor, data)
        # Of a line cut short, the next one repairs the end; where only the newline is missing, nothing is lost.
        self._torn = written < len(data) and not (self._torn and written == 1)
        if written < len(data) - 1:
            problem = f"only {written} of the {len(data)} bytes of a journal line were written"
            raise OSError(errno.ENOSPC, problem, str(self.path))
        if synced:
            os.fsync(self._descriptor)


def events(path: str | Path) -> list[dict[str, Any]]:
    """Every whole line in the order of the file, those of void attempts too; [] where there is no file."""
    return Tail(path).read()


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines that count, in the order of the file: whole, and not void."""
    return valid(events(path))


def evaluations(path: str | Path) -> list[dict[str, Any]]:
    """The "eval" lines that count, in order of time: of the training at `path`, and of evaluations beside it."""
    beside = [line for other in Path(path).parent.glob(EVALUATIONS) for line in events(other)]
    found = [line for line in valid(events(path) + beside) if line["event"] == "eval"]
    return sorted(found, key=lambda line: line["time"])


def evaluation_journal(path: str | Path) -> Journal:
    """The writing end for an evaluation of the run whose journal is `path`, in a file of its own."""
    path = Path(path)
    who = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{socket.gethostname()}-{os.getpid()}"
    journal = Journal(path.with_name(EVALUATIONS.replace("*", who)))
    journal.attempt = highest_attempt(events(path))
    return journal


def highest_attempt(lines: Iterable[dict[str, Any]]) -> int:
    return max((line["attempt"] for line in lines), default=0)


def valid(lines: Iterable[dict[str, Any]], begun: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The lines left when each attempt has made void what earlier attempts wrote past the step it began at.

    begun: "attempt" lines known from before, of which none is given back.
    """
    lines = list(lines)
    begins: dict[int, int] = {line["attempt"]: line["step"] for line in begun}
    for line in lines:
        if line["event"] == "attempt":
            begins[line["attempt"]] = line["step"]
    limit: dict[int, float] = {}  # by attempt: the last step of it that no later attempt went through again
    lowest = math.inf
    for attempt in sorted(begins.keys() | {line["attempt"] for line in lines}, reverse=True):
        limit[attempt] = lowest
        lowest = min(lowest, begins.get(attempt, math.inf))
    return [line for line in lines if line["event"] in NEVER_VOID or line["step"] <= limit[line["attempt"]]]


class Tails:
    """Reads as they grow a run's journal and the files beside it that hold curves: each `read` gives the new lines.

    first, last: when the run's own first and last line were written (unix seconds); None as long as there is none.
    own: of the last `read` the lines of the run's own journal.
    """

    def __init__(self, path: str | Path):
        self._main = Tail(path)
        self._beside: dict[Path, Tail] = {}
        self.first: float | None = None
        self.last: float | None = None
        self.own: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        for pattern in (EVALUATIONS, SYSTEM, SWEEP):
            for path in sorted(self._main.path.parent.glob(pattern)):
                self._beside.setdefault(path, Tail(path))
        lines = self.own = self._main.read()
        if lines:
            self.first, self.last = self.first or lines[0]["time"], lines[-1]["time"]
        return lines + [line for tail in self._beside.values() for line in tail.read()]


class Tail:
    """Reads a journal as it grows: each `read` gives the whole lines that came since the one before."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """New whole lines, parsed; torn and foreign ones are passed over. A line without its newline waits."""
        try:
            with open(self.path, "rb") as f:
                f.seek(self._offset)
                data = f.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [line for line in map(_parse, whole.split(b"\n")) if line is not None]


def _parse(raw: bytes) -> dict[str, Any] | None:
    """The event of one line, or None when it is not one."""
    try:
        line = json.loads(raw)
        if not isinstance(line, dict) or not all(isinstance(line.get(k), t) for k, t in _FIELDS.items()):
            return None
        line["metrics"] = {
            name: value if isinstance(value, (int, float)) else NON_FINITE[value]
            for name, value in line["metrics"].items()
        }
    except (ValueError, KeyError, TypeError):
        return None
    return line


def _number(value: Any) -> int | float | str:
    """A metric as strict JSON has it: NumPy and torch scalars become floats, non-finite ones their names."""
    if isinstance(value, int):
        return int(value)
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
