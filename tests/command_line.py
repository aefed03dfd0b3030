"""The command line on forked ranks: functions for `run_ranks`."""

import io
import os
import sys
import tempfile
from pathlib import Path

from tests.ranks import run_ranks


def command(*arguments):
    """(exit code, what this rank wrote to the terminal) of `dtrain …`, in this rank."""
    from dtrain.cli import main

    sys.argv = ["dtrain", *map(str, arguments)]
    log = Path(tempfile.mkdtemp()) / "terminal.txt"
    fd = os.open(log, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)
    try:
        main()
    except SystemExit as e:
        sys.stdout.flush()
        return e.code, log.read_text()


def failing(*arguments, world_size=1):
    """The one line of a command that must fail with exit code 2 on every rank that says something."""
    results = run_ranks(command, world_size, *arguments)
    assert 2 in [code for code, _ in results]
    lines = [line for code, text in results for line in text.splitlines()]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("dtrain: ")
