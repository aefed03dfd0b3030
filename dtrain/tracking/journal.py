"""The journal: what happened in a run, one JSON object a line, append-only and never cut (design, decision 6).

    {"event": "train", "step": 10, "images": 1280, "attempt": 1, "time": 1.7e9, "metrics": {"loss": 0.9}, "context": {}}

It is the truth that curves, reports and MLflow are made from, so it needs nothing but a file: no torch, no mlflow.
A line counts when its newline is there. An `attempt` line says where a resume went on: what earlier attempts wrote past
that step is void, because the run goes through those steps again. Strict JSON has no NaN: in `metrics`, where every
value is a number, non-finite ones are the strings "NaN", "Infinity" and "-Infinity", and readers give floats back.
What readers take for a line is in `lines`.

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dtrain.credentials import masked
from dtrain.errors import UserError
from dtrain.files import beside, open_regular, opener
from dtrain.tracking.lines import MOST_COUNT, MOST_LINE, parse, parse_combination

SYNCED = {"attempt", "checkpoint", "eval", "eval_failed"}  # worth an fsync: rare, and decisions are taken by them
EVALUATIONS, SYSTEM, SWEEP = "journal-eval-*.jsonl", "system-rank-*.jsonl", "sweep.jsonl"
OTHER_RANKS = "journal-rank-*.jsonl"
NEVER_VOID = {"system", "sweep", "floor"}  # true of machines, a checkpoint or a first stage, of no steps
_CHUNK = 1 << 17  # bytes read at a time: they stay in the processor's cache, and malloc takes no fresh pages for them
_END = 1 << 22  # bytes in which a last line is looked for
_TRAIN, _WHOLE = b'{"event": "train", ', ord("}")  # how the lines begin that are most of a journal, and end
ENDS = 1 << 62  # as `every` of a Tail: of "train" lines that follow each other the last alone


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
        self.attempt = number or highest_attempt(outline(self.path)) + 1
        self.append("attempt", step, images, context=context)
        return self.attempt

    def append(
        self,
        event: str,
        step: int,
        images: int,
        metrics: dict[str, float] | None = None,
        context: dict[str, Any] | None = None,
    ) -> bytes:
        """Write one line, and give it back. `metrics` holds numbers of any kind that `float` takes; `context` is plain
        JSON data, of which secrets are left out.

        Raises OSError when the line did not reach the file whole (a full disk); the next line then starts on its own.
        """
        if self.attempt is None:
            self.attempt = highest_attempt(outline(self.path))
        line = self._line(event, step, images, metrics or {}, context or {})
        self._write(line, event in SYNCED)
        return line

    def _line(self, event: str, step: int, images: int, metrics: dict, context: dict) -> bytes:
        line = {
            "event": event,
            "step": int(step),
            "images": int(images),
            "attempt": self.attempt,
            "time": round(time.time(), 3),
            "metrics": {name: _number(value) for name, value in metrics.items()},
            "context": masked(context),
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
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK  # a FIFO that is full would stop the run
            self._descriptor = os.open(self.path, flags, 0o644)
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
    """Every whole line in the order of the file, those of void attempts too; [] where there is no file.

    Raises UserError for what is not a file, and OSError.
    """
    return Tail(path).read()


def outline(path: str | Path) -> list[dict[str, Any]]:
    """As `events`, without the curves: of "train" lines that follow each other the last alone. A million steps take as
    long to read as their file, and no memory.
    """
    return Tail(path, every=ENDS).read()


def stride(path: str | Path, most: int) -> int:
    """Of how many "train" lines to read one, so that about `most` bytes are read with care. Raises OSError."""
    try:
        return 1 + os.stat(path).st_size // most
    except FileNotFoundError:
        return 1


def last_line(path: str | Path) -> dict[str, Any] | None:
    """The last whole line, by the end of the file alone; None where it is not there. Raises OSError."""
    with open(path, "rb", buffering=0, opener=opener) as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - _END))
        *lines, _ = f.read(_END).split(b"\n")
    return next((line for line in map(parse, reversed(lines)) if line is not None), None)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines that count, in the order of the file: whole, and not void."""
    return valid(events(path))


def evaluations(path: str | Path) -> list[dict[str, Any]]:
    """The "eval" lines that count, in order of time: of the training at `path`, and of evaluations beside it."""
    others = [line for other in beside(Path(path), EVALUATIONS) for line in events(other)]
    found = [line for line in valid(outline(path) + others) if line["event"] == "eval"]
    return sorted(found, key=lambda line: line["time"])


def evaluation_journal(path: str | Path) -> Journal:
    """The writing end for an evaluation of the run whose journal is `path`, in a file of its own."""
    path = Path(path)
    who = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{socket.gethostname()}-{os.getpid()}"
    journal = Journal(path.with_name(EVALUATIONS.replace("*", who)))
    journal.attempt = highest_attempt(outline(path))
    return journal


def combinations(path: str | Path) -> dict[str, dict[str, Any]]:
    """Key → last line of each combination of a sweep; {} where there is no file. Raises as `events` does."""
    return {line["key"]: line for line in Tail(path, parse_combination).read()}


def highest_attempt(lines: Iterable[dict[str, Any]]) -> int:
    """The number of the newest attempt, 0 without one; always one that another may follow."""
    return min(max((line["attempt"] for line in lines), default=0), MOST_COUNT - 1)


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

    def read(self, most: int = ENDS) -> list[dict[str, Any]]:
        """most: lines; of more, another call gives the rest, and only the one that finds nothing new gives none."""
        for pattern in (EVALUATIONS, SYSTEM, SWEEP):
            for path in beside(self._main.path, pattern):
                self._beside.setdefault(path, Tail(path))
        found = self.own = self._main.read(most)
        if found:
            self.first, self.last = self.first or found[0]["time"], found[-1]["time"]
        for tail in self._beside.values():
            if len(found) >= most:
                break
            found = found + tail.read(most - len(found))
        return found


class Tail:
    """Reads a journal as it grows: each `read` gives the whole lines that came since the one before.

    every: of "train" lines that follow each other each `every`-th, and the last; the others are passed over unread.
    left_out: how many lines so far were torn or none of a journal's.
    """

    def __init__(self, path: str | Path, parse: Callable[[bytes], dict[str, Any] | None] = parse, every: int = 1):
        self.path = Path(path)
        self.left_out = 0
        self._parse, self._every = parse, every
        self._offset = 0
        self._overlong = False  # what was read last is a piece of a line that is too long
        self._since, self._held = 0, None  # of lines that are passed over: how many, and the last

    def read(self, most: int = ENDS) -> list[dict[str, Any]]:
        """New whole lines, parsed; others are passed over and counted. A line without its newline waits.

        most: lines, after which no further part of the file is looked at until the next call, which goes on there.
        Raises UserError for what is not a file, and OSError.
        """
        found: list[dict[str, Any]] = []
        try:
            descriptor = open_regular(self.path)
        except FileNotFoundError:
            return found
        except OSError as e:
            if e.errno in (errno.EINVAL, errno.EISDIR):
                raise UserError(f"{self.path} is not a regular file; move it away") from None
            raise
        with open(descriptor, "rb", buffering=0) as f:
            f.seek(self._offset)
            rest = b""
            while len(found) < most and (chunk := f.read(_CHUNK)):
                data = rest + chunk
                *lines, rest = data.split(b"\n")
                self._offset += len(data) - len(rest)
                whole = lines[1:] if self._overlong else lines
                self._overlong = self._overlong and not lines
                self._take(self._wanted(whole), found)
                if len(rest) > MOST_LINE:
                    self._offset += len(rest)
                    self.left_out += not self._overlong
                    self._overlong, rest = True, b""
            if self._held is not None:
                self._take([self._held], found)
                self._held = None
        return found

    def _take(self, lines: Iterable[bytes], found: list[dict[str, Any]]) -> None:
        for raw in lines:
            if (line := self._parse(raw)) is None:
                self.left_out += 1
            else:
                found.append(line)

    def _wanted(self, lines: list[bytes]) -> Iterator[bytes]:
        """Of whole lines all but "train" lines that are passed over; the last of those is held."""
        others = [n for n, line in enumerate(lines) if not (line.startswith(_TRAIN) and line[-1] == _WHOLE)]
        begin = 0
        for other in [*others, len(lines)]:
            if trains := lines[begin:other]:
                yield from trains[self._every - self._since - 1 :: self._every]
                self._since = (self._since + len(trains)) % self._every
                self._held = trains[-1] if self._since else None
            if other < len(lines):
                if self._held is not None:
                    yield self._held
                self._held, self._since = None, 0
                if lines[other]:
                    yield lines[other]
            begin = other + 1


def _number(value: Any) -> int | float | str:
    """A metric as strict JSON has it: NumPy and torch scalars become floats, non-finite ones their names."""
    if isinstance(value, int):
        return int(value)
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
