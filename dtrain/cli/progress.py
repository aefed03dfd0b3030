"""A bar on rank 0's terminal, or a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

LOG_SECONDS = 30.0  # between two lines about progress where there is no terminal


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives on_block(done, of): on rank 0 a bar on a terminal, now and then a line in a log."""
    from rich.console import Console
    from rich.progress import Progress

    from dtrain import distributed

    if distributed.rank() != 0:
        yield lambda done, of: None
        return
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        begun, said = None, time.monotonic()

        def on_block(done: int, of: int) -> None:
            nonlocal begun, said
            bar.update(task, completed=done, total=of)
            now = time.monotonic()
            if begun is None:  # what came before was getting ready, or was done by a call that was killed
                begun, said = (now, done), now
            if not console.is_terminal and begun[1] < done < of and now - said > LOG_SECONDS:
                left = timedelta(seconds=round((now - begun[0]) / (done - begun[1]) * (of - done)))
                print(f"dtrain: {what}: {done} of {of}, {left} left", file=sys.stderr, flush=True)
                said = now

        yield on_block
