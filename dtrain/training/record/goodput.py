"""Where an attempt's time goes, to the second: each moment since the process began belongs to exactly one kind.

    productive_s     steps that were taken
    data_wait_s      waiting for the batches of these
    save_stall_s     copying for a checkpoint, and waiting for one to be durable; the writing itself goes on beside
    evaluation_s
    bad_step_s       steps that were refused
    restart_s        from the start of the process, or from where the run went back, to the next step
    wall_s           all of it

Beside these lost_steps, which an earlier attempt had done past the checkpoint that this one began from, refused_images,
and share, productive_s of wall_s. As rank 0 sees it; they accumulate through an attempt.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtrain.position import Position
from dtrain.tracking.tracker import Tracker

KINDS = ("productive_s", "data_wait_s", "save_stall_s", "evaluation_s", "bad_step_s", "restart_s")
SECONDS_BETWEEN_LINES = 30.0


class Goodput:
    """seconds: by kind, of the attempt so far, up to the last change of kind."""

    def __init__(self, tracker: Tracker, age: float | None = None):
        """age: seconds since this process began; default: asked of the system."""
        self._tracker = tracker
        self._begin(time.perf_counter() - (process_age() if age is None else age))

    def _begin(self, moment: float) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "restart_s", moment
        self._productive = 0.0  # of the steps that have ended
        self._lost_steps = self._refused_images = 0
        self._written = time.perf_counter()

    def begin_attempt(self, lost_steps: int) -> None:
        self._lost_steps = lost_steps

    def end_attempt(self, position: Position) -> None:
        """The run goes back: what follows is another attempt, which begins with a restart."""
        self.journal(position)
        self._begin(self._since)

    def train(self) -> None:
        """From now on steps are taken."""
        self._turn("productive_s")

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        outer = self._kind
        self._turn(kind)
        try:
            yield
        finally:
            self._turn(outer)

    def step(self, taken: bool, data_seconds: float, images: int) -> None:
        """A step ends, for whose data of `images` images this rank has waited `data_seconds`."""
        self._turn("productive_s")
        spent = self.seconds["productive_s"] - self._productive
        kind, part = ("data_wait_s", min(data_seconds, spent)) if taken else ("bad_step_s", spent)
        self.seconds["productive_s"] -= part
        self.seconds[kind] += part
        self._productive = self.seconds["productive_s"]
        self._refused_images += 0 if taken else images

    def metrics(self) -> dict[str, float]:
        self._turn(self._kind)
        wall = sum(self.seconds.values())
        counts = {"lost_steps": self._lost_steps, "refused_images": self._refused_images}
        return self.seconds | counts | {"wall_s": wall, "share": self.seconds["productive_s"] / wall}

    def journal(self, position: Position) -> None:
        self._written = time.perf_counter()
        self._tracker.write("goodput", position, self.metrics())

    def journal_now_and_then(self, position: Position) -> None:
        if time.perf_counter() - self._written >= SECONDS_BETWEEN_LINES:
            self.journal(position)

    def _turn(self, kind: str) -> None:
        now = time.perf_counter()
        self.seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now


def process_age() -> float:
    """Seconds since this process was started."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
