"""What ranks print: rank 0 to the terminal, the others to logs/rank-N.log, an error once."""

import os
import sys
from pathlib import Path

from dtrain import distributed

_terminal = 2  # the file descriptor errors go to; moved when this rank's output is redirected


def redirect_to_log(folder: Path) -> None:
    """Send all that this process prints from now on, from C too, to its log file. For ranks other than 0."""
    global _terminal
    path = folder / f"rank-{distributed.rank()}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    if _terminal == 2:
        _terminal = os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def say_error(message: str, shared: bool = False) -> None:
    """One line, from rank 0 alone where all ranks have it: `shared`, or met before ranks talk to each other."""
    if distributed.rank() == 0 or (_terminal != 2 and not shared):
        os.write(_terminal, f"dtrain: {' '.join(message.split())}\n".encode())
