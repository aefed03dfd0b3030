"""What a person sees while a run trains: bars on a terminal, a line now and then in a log file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dtrain.credentials import redacted
from dtrain.terminal import printable

SECONDS_BETWEEN_LINES = 30.0


class TrainingProgress:
    """Rank 0's view; on other ranks everything here does nothing."""

    def __init__(self, total: int, completed: int, visible: bool):
        self.total, self.visible = total, visible
        self.console = Console(soft_wrap=True, highlight=False)
        self._bar = None
        self._last_line = time.monotonic()
        if visible and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[about]}ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("train", total=total, completed=completed, about="")
            self._bar.start()

    def update(self, step: int, loss: float, images_per_second: float, seconds_per_step: float) -> None:
        about = f"loss {loss:.4f}  {images_per_second:,.0f} images/s  "
        if self._bar is not None:
            self._bar.update(self._task, completed=step, about=about)
        elif self._line_is_due():
            left = timedelta(seconds=int((self.total - step) * seconds_per_step))
            self.say(f"step {step}/{self.total}  {about}ETA {left}")

    @contextmanager
    def phase(self, what: str) -> Iterator[Callable[..., None]]:
        """Something long beside the steps: gives a function to call with how much of it is done, of how much."""
        task = self._bar.add_task(what, total=None, about="") if self._bar is not None else None
        begun = time.monotonic()

        def show(done: int, of: int, now: str | None = None) -> None:
            if task is not None:
                self._bar.update(task, completed=done, total=of or None, description=now or what)
            elif 0 < done < of and self._line_is_due():
                left = timedelta(seconds=round((time.monotonic() - begun) / done * (of - done)))
                self.say(f"{now or what}: {done:,} of {of:,}  ETA {left}")

        try:
            yield show
        finally:
            if task is not None:
                self._bar.remove_task(task)

    def say(self, line: str) -> None:
        if self.visible:
            self.console.print(printable(redacted(line)), markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line_is_due(self) -> bool:
        now = time.monotonic()
        if not self.visible or now - self._last_line < SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True
