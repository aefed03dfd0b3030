"""`dtrain …` on a terminal of its own, whose Ctrl-C is the kernel's: it signals every process in the foreground."""

import io
import os
import pty
import re
import select
import signal
import sys
import time

from dtrain.chaos import forked

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """A forked process that runs the command; `said` is what it has shown, without control sequences."""

    def __init__(self, *arguments):
        self._master, slave = pty.openpty()
        environment = {"DTRAIN_FAULTS": os.environ.get("DTRAIN_FAULTS", ""), "TERM": "xterm"}
        (self.process,) = forked.fork_ranks(_command, [(os.ttyname(slave), list(map(str, arguments)))], environment)
        self._slave = slave  # held open, so that reading is no error before the process has opened it
        self._bytes = b""

    @property
    def said(self) -> str:
        return CONTROL.sub("", self._bytes.decode(errors="replace"))

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def hang_up(self) -> None:
        """Close the terminal, as a lost connection does."""
        os.close(self._slave)
        os.close(self._master)

    def wait_for(self, condition, timeout: float = 60.0) -> None:
        """Until condition() is true. Fails where the process ends before."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, self.said
            assert self.process.is_alive(), self.said
            self._read(0.005)

    def exit_code(self, timeout: float = 60.0) -> int:
        end = time.monotonic() + timeout
        while self.process.is_alive():
            assert time.monotonic() < end, self.said
            self._read(0.01)
        self._read(0)
        return self.process.exitcode

    def _read(self, seconds: float) -> None:
        try:
            while select.select([self._master], [], [], seconds)[0]:
                self._bytes += os.read(self._master, 65536)
                seconds = 0
        except OSError:
            time.sleep(seconds)  # hung up


def _command(terminal: str, arguments: list[str]) -> None:
    from dtrain.cli import main

    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)  # a background job inherits that they are ignored
    os.setsid()
    fd = os.open(terminal, os.O_RDWR)  # the terminal of this session from now on
    for standard in (0, 1, 2):
        os.dup2(fd, standard)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)
    sys.argv = ["dtrain", *arguments]
    main()
