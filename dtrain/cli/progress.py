"""A bar on rank 0's terminal, or a line now and then in a log."""

import sys

LOG_SECONDS = 30.0  # between two lines about progress where there is no terminal


def progress(what: str):
    """A context manager giving on_block(done, of): on rank 0 a bar on a terminal, now and then a line in a log."""
    import time
    from contextlib import contextmanager
    from datetime import timedelta

    from rich.console import Console
    from rich.progress import Progress

    from dtrain import distributed

    @contextmanager
    def bar():
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task(what, total=None)
            began = said = time.monotonic()

            def on_block(done: int, of: int) -> None:
                nonlocal said
                progress.update(task, completed=done, total=of)
                now = time.monotonic()
                if not console.is_terminal and done < of and now - said > LOG_SECONDS:
                    left = timedelta(seconds=round((now - began) / done * (of - done)))
                    print(f"dtrain: {what}: {done} of {of}, {left} left", file=sys.stderr, flush=True)
                    said = now

            yield on_block

    @contextmanager
    def nothing():
        yield lambda done, of: None

    return bar() if distributed.rank() == 0 else nothing()
