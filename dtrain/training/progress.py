"""What a person sees while a run trains: a bar on a terminal, a line now and then in a log file."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} images/s  ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("train", total=total, completed=completed, loss=float("nan"), rate=0.0)
            self._bar.start()

    def update(self, step: int, loss: float, images_per_second: float, seconds_per_step: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, rate=images_per_second)
        elif self.visible and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = int((self.total - step) * seconds_per_step)
            eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            self.say(f"step {step}/{self.total}  loss {loss:.4f}  {images_per_second:,.0f} images/s  ETA {eta}")

    def say(self, line: str) -> None:
        if self.visible:
            self.console.print(line, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
