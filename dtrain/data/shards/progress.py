"""A bar on the terminal for work that goes over bytes; nothing where there is no terminal."""

from contextlib import contextmanager


@contextmanager
def bytes_bar(what: str, total: int | None):
    """Gives a function to call with the bytes of each piece done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
