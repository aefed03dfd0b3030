"""Finds a hang: no step within a limit that recent steps taught. Then all stacks are written, and the rank leaves.

Each rank has a thread of its own, because a rank that waits in a collective for another looks as stuck as the one it
waits for, and a frozen process (SIGSTOP, a dead node) can say nothing. Limits come from what all ranks have reduced, so
they are the same everywhere and pass within moments of each other; who is first waits for the others to write.

What it cannot see into: a thread that holds Python's lock for ever stops this rank's watchdog too. The others leave.
"""

import faulthandler
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

from dtrain.errors import HANG
from dtrain.files import opener
from dtrain.run import RunDirectory
from dtrain.training.record.output import say_error

TICK_SECONDS = 0.5
PATIENCE = 10  # times the slowest recent step or evaluation
RECENT = 50
WORD_SECONDS = 3.0  # for the stacks and the outcome: a file system that hangs must not keep us
GRACE_SECONDS = 3.0  # for the others, whose connections break when we leave
FIRST_EVALUATION = 21600.0  # seconds


class Limit(NamedTuple):
    """why: where the number comes from, and the key that changes it."""

    seconds: float
    why: str


@dataclass
class During:
    whole: bool = True  # the phase did all that it is for


class Watchdog:
    """floor: seconds that no limit is under; 0: nothing is watched. start: seconds where no step has taught a limit."""

    def __init__(self, run: RunDirectory, rank: int, floor: float, start: float):
        self._run, self._rank, self._floor, self._start = run, rank, floor, start
        self._recent = {"step": deque(maxlen=RECENT), "evaluation": deque(maxlen=RECENT)}
        self._waited = 0.0
        self._phase = "start"
        self._limit = self.limit_of("start")
        self._closed = threading.Event()
        self.step = 0  # steps done
        self.attempt: int | None = None
        if floor:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int, seconds: float | None = None) -> None:
        """A step is done, or the run ready for its first. seconds: what it took here, until all ranks' are reduced."""
        self.step = step
        if seconds is not None and not self._recent["step"]:
            self._recent["step"].append(seconds)
        self._enter("step")

    def on_reduced(self, seconds: list[float]) -> None:
        """How long a step took each rank."""
        self._recent["step"].append(max(seconds))

    @contextmanager
    def during(self, phase: str) -> Iterator["During"]:
        """Not a step but "start", "saving" or "evaluation", in which limits are others.

        Who is within says by what is yielded where it came to no end that later limits can be learned from.
        """
        outer, started, now = self._phase, time.monotonic(), During()
        self._enter(phase)
        try:
            yield now
        finally:
            if phase in self._recent and now.whole:
                self._recent[phase].append(time.monotonic() - started)
            self._enter(outer)

    def close(self) -> None:
        self._closed.set()

    def limit_of(self, phase: str) -> Limit:
        """The first step may take as long as the start does: much is compiled and connected in it."""
        if recent := self._recent.get(phase):
            limit = Limit(PATIENCE * max(recent), f"{PATIENCE} times the slowest recent {phase}")
        elif phase == "evaluation":
            limit = Limit(FIRST_EVALUATION, "the limit of a first evaluation; a higher train.hang_limit raises it")
        else:
            limit = Limit(self._start, "train.start_limit, which is for the start, the first step and each save")
        return max(limit, Limit(self._floor, "train.hang_limit, the least of all limits"))

    def _enter(self, phase: str) -> None:
        self._phase, self._limit, self._waited = phase, self.limit_of(phase), 0.0

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(TICK_SECONDS):
            now = time.monotonic()
            # A job that was suspended as a whole has not waited: a tick that took long counts as two.
            self._waited += min(now - before, 2 * TICK_SECONDS)
            before = now
            if self._waited > self._limit.seconds:
                self._leave()

    def _leave(self) -> None:
        writer = threading.Thread(target=self._leave_word, name="last-words", daemon=True)
        writer.start()
        writer.join(WORD_SECONDS)
        time.sleep(GRACE_SECONDS)
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(HANG)

    def _leave_word(self) -> None:
        """Each part on its own: a full disk must hinder neither the others nor the end."""
        while_in = "" if self._phase == "step" else f" ({self._phase})"
        message = (
            f"rank {self._rank} hangs after step {self.step}{while_in}: nothing happened for "
            f"{self._limit.seconds:.0f} s ({self._limit.why}); what each rank was doing is in "
            f"{self._run.logs}/rank-*.stacks"
        )
        with suppress(OSError), open(self._run.logs / f"rank-{self._rank}.stacks", "w", opener=opener) as file:
            file.write(f"{message}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if self._rank != 0:
            time.sleep(2 * TICK_SECONDS)
            if self._run.outcome() is not None:
                return  # rank 0, or another, has said it
        with suppress(OSError):
            self._run.write_outcome("hang", self.step, self.attempt, message)
        with suppress(OSError):
            say_error(message)
