"""What ranks print: rank 0 to the terminal, the others to logs/rank-N.log, an error once."""

import contextlib
import io
import os
import stat
import sys
import threading
import traceback
from pathlib import Path

from dtrain import distributed
from dtrain.credentials import redacted
from dtrain.files import open_regular
from dtrain.terminal import printable

_LOG = os.O_WRONLY | os.O_CREAT | os.O_APPEND
_terminal = 2  # the file descriptor errors go to; moved when this rank's output is redirected


def redirect_to_log(folder: Path) -> None:
    """Send all that this process prints from now on, from C too, to its log file. For ranks other than 0."""
    global _terminal
    path = folder / f"rank-{distributed.rank()}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    if _terminal == 2:
        _terminal = os.dup(2)
    try:
        log = open_regular(path, flags=_LOG)
    except OSError:  # a full disk, or a FIFO that nobody reads: it costs output, and not the run
        log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def leave_terminal(folder: Path) -> None:
    """Send what goes to the terminal, which has been closed, to this rank's log file. In a signal handler: no flush."""
    with contextlib.suppress(OSError):
        log = open_regular(folder / f"rank-{distributed.rank()}.log", flags=_LOG)
        for fd in (1, 2):
            found = os.fstat(fd)
            if stat.S_ISCHR(found.st_mode) and found.st_rdev != os.stat(os.devnull).st_rdev:
                os.dup2(log, fd)
        os.close(log)


def say_error(message: str, shared: bool = False) -> None:
    """One line, from rank 0 alone where all ranks have it: `shared`, or met before ranks talk to each other."""
    if distributed.rank() == 0 or (_terminal != 2 and not shared):
        with contextlib.suppress(OSError):  # the exit code says it too
            os.write(_terminal, f"dtrain: {printable(redacted(' '.join(message.split())))}\n".encode())


def clean_tracebacks() -> None:
    """From now on a traceback is shown without secrets: messages of libraries repeat the addresses that they got."""

    def show(error: BaseException) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(traceback_of(error), end="", file=sys.stderr, flush=True)

    sys.excepthook = lambda _, error, trace: show(error.with_traceback(trace))
    # A thread that leaves by sys.exit says nothing, as Python has it.
    threading.excepthook = lambda it: show(it.exc_value) if it.exc_type is not SystemExit else None


def traceback_of(error: BaseException) -> str:
    """As Python prints it, without secrets."""
    lines = "".join(traceback.format_exception(error)).split("\n")
    return "\n".join(redacted(line, code=True) for line in lines)


def forgive_output() -> None:
    """From now on what this process cannot print is lost, and nothing else: a full disk below a log, a pipe whose
    reader has gone or a terminal that has must not end a training. For commands whose output is not what they are for.
    """
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(_Forgiving(fd), encoding="utf-8", errors="backslashreplace", write_through=True)
        for fd in (1, 2)
    )


class _Forgiving(io.RawIOBase):
    """A file descriptor to write to, which tries each write anew: a disk may have room again."""

    def __init__(self, fd: int):
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data) -> int:
        left = memoryview(data)
        with contextlib.suppress(OSError):
            while left:
                left = left[os.write(self._fd, left) :]
        return len(data)
