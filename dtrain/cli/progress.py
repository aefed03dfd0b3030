"""A bar on rank 0's terminal, or a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

LOG_SECONDS = 30.0  # between two lines about progress where there is no terminal


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """Gives on_block(done, of, what): on rank 0 a bar on a terminal, now and then a line in a log.

    Its `what` may be left out: then it stays. Nobody knows how much there is to do where `of` is 0.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dtrain import distributed

    if distributed.rank() != 0:
        yield lambda done, of, what=None: None
        return
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        begun, said = None, None

        def on_block(done: int, of: int, now_at: str | None = None) -> None:
            nonlocal begun, said, what
            if now_at not in (None, what):
                what, begun = now_at, None
            bar.update(task, completed=done, total=of or None, description=what)
            now = time.monotonic()
            said = now if said is None else said
            if begun is None:  # what came before was getting ready, or was done by a call that was killed
                begun = now, done
            if not console.is_terminal and begun[1] < done < of and now - said > LOG_SECONDS:
                left = timedelta(seconds=round((now - begun[0]) / (done - begun[1]) * (of - done)))
                print(f"dtrain: {what}: {done} of {of}, {left} left", file=sys.stderr, flush=True)
                said = now

        yield on_block
