"""Ctrl-C (SIGINT) in a command: it ends in no traceback, and a second one ends the process at once, wherever it is.

What the first one does is the command's choice:

    nothing chosen   KeyboardInterrupt in the main thread, so that what is open is closed
    at_once          the process ends where it is: for work that a kill does not harm, done by several ranks that would
                     otherwise wait for each other
    by_request       the command, which has taken the signal over, ends by itself

A thread counts: Python runs signal handlers in the main thread alone, and that may wait in a collective for ever.
"""

import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from dtrain.errors import INTERRUPTED

# Launchers and wrappers pass on a Ctrl-C that the terminal has sent to every process already.
SAME_PRESS_SECONDS = 0.5
PATIENCE_SECONDS = 2.0  # till it is said that there is a second Ctrl-C
CLEAR_LINE, SHOW_CURSOR = b"\r\x1b[2K", b"\x1b[?25h"  # a bar may be on the terminal

Words = str | Callable[[], str | None]


class CtrlC:
    """The one of this process: `ctrl_c`."""

    def __init__(self):
        self._say: Callable[[str], None] | None = None  # None: nobody watches
        self._pressed: float | None = None  # when first
        self._raised = False
        self._choice = "unwind"
        self._words: Words | None = None
        self._on_press: Callable[[], None] = lambda: None
        self._closing: list[Callable[[], None]] = []
        self._leaving = threading.Lock()

    def watch(self, say: Callable[[str], None]) -> None:
        """Take SIGINT over until the process ends, unless it is ignored. say: shows the user a line."""
        if self._say is not None or is_ignored(signal.SIGINT):
            return
        self._say = say
        read, write = os.pipe()
        os.set_blocking(write, False)
        threading.Thread(target=self._count, args=(read,), name="ctrl-c", daemon=True).start()
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._on_signal)
        os.register_at_fork(after_in_child=_leave_it_to_the_parent)

    def kept(self, words: Words | None) -> None:
        """What to say at the end that Ctrl-C brings: the line, or a function that finds it then."""
        self._words = words

    def at_once(self, words: Words | None = None) -> None:
        """From now on a Ctrl-C ends the process where it is, with these words; an earlier one has had its answer."""
        self._choice, self._words, self._pressed = "at once", words, None

    def by_request(self, agree: Callable[[], None], on_press: Callable[[], None], words: Words) -> None:
        """From now on the first Ctrl-C calls `on_press`, in a thread, and a second ends the process with these words.

        agree: returns once every rank is here. One that met Ctrl-C before this has left at once, so none may go on
        until all have come.
        """
        before, self._choice = self._choice, "agreeing"
        try:
            agree()
        except Exception:
            if self._pressed is not None and before == "at once":
                self.leave()
            raise
        self._words, self._on_press = words, on_press
        self._choice = "by request"
        if self._pressed is not None:
            self._request()

    def on_leaving(self, close: Callable[[], None]) -> None:
        """To be called where the process ends at once, from whichever thread."""
        self._closing.append(close)

    @property
    def is_ending(self) -> bool:
        """Whether Ctrl-C ends this process, so that what fails now is news to nobody."""
        return self._raised or (self._pressed is not None and self._choice in ("at once", "agreeing"))

    def end(self) -> int:
        """The exit code of a command that Ctrl-C has ended, once it has said what is kept."""
        if self._choice != "unwind":
            self.leave()
        self.say_what_is_kept()
        return INTERRUPTED

    def rest(self) -> None:
        """The command is done: nothing is left that Ctrl-C could harm."""
        if self._say is not None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def leave(self) -> NoReturn:
        """End this process now, with its children and the words about what is kept."""
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()  # another thread is about it
        self.say_what_is_kept()
        for child in multiprocessing.active_children():
            child.kill()
        for close in self._closing:
            with suppress(Exception):
                close()
        os._exit(INTERRUPTED)

    def say_what_is_kept(self) -> None:
        with suppress(Exception):  # the terminal may be gone, the folder that is asked about too
            if sys.stderr.isatty():
                os.write(2, CLEAR_LINE + SHOW_CURSOR)
            words = self._words() if callable(self._words) else self._words
            if words and self._say is not None:
                self._say(words)

    def _on_signal(self, _number: int, _frame) -> None:
        if self._pressed is None:
            self._pressed = time.monotonic()
        if self._choice == "unwind" and not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _request(self) -> None:
        on_press, self._on_press = self._on_press, lambda: None
        on_press()

    def _count(self, pipe: int) -> None:
        counted, first = 0, 0.0
        while True:
            waits = counted == 1 and self._choice == "unwind"
            if not select.select([pipe], [], [], PATIENCE_SECONDS if waits else None)[0]:
                self._say("ending; Ctrl-C again ends at once")
                counted = 2
            elif signal.SIGINT in os.read(pipe, 64):
                now = time.monotonic()
                if not counted:
                    counted, first = 1, now
                    self._pressed = self._pressed or now
                    if self._choice == "by request":
                        self._request()
                elif now - first >= SAME_PRESS_SECONDS:
                    self.leave()
                if self._choice == "at once":
                    self.leave()


ctrl_c = CtrlC()


def is_ignored(number: int) -> bool:
    """Whether this process was started without this signal, as by nohup or in a script's background."""
    return signal.getsignal(number) is signal.SIG_IGN


def die_quietly() -> None:
    """Until `watch`: SIGINT ends this process as the system does it, which prints nothing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _leave_it_to_the_parent() -> None:
    """In a forked child: the terminal signals it too, and its parent ends it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
