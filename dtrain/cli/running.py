"""`dtrain train` and `dtrain sync`."""

from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import Overrides, RunName
from dtrain.errors import STOPPED


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, see configs/")],
    overrides: Overrides = None,
    check: Annotated[bool, typer.Option("--check", help="only say whether it could start, in a second")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="with --check: the number of ranks it would run on")] = 1,
) -> None:
    """Start a run, or go on with it where its directory exists; alone or on every rank a launcher started.

    Exit codes: 0 finished, 2 a mistake, 75 stopped on request with a checkpoint (run it again).
    """
    from dtrain import config as configuration

    settings = configuration.load(config, overrides or [])
    if check:
        from dtrain.training.check import check_start

        print(check_start(settings, ranks))
        return

    from dtrain import distributed
    from dtrain.training.summary import summary

    distributed.prepare()
    from dtrain.training.loop import train as run_training

    outcome = run_training(settings)
    if distributed.rank() == 0 and (said := summary(settings.run.path)):
        print(said)
    distributed.finalize()
    if outcome == "stopped":
        raise typer.Exit(STOPPED)


def sync(run: RunName) -> None:
    """Send journal lines that MLflow does not have yet."""
    from dtrain.run import RunDirectory
    from dtrain.tracking.tracker import sync as run_sync

    print(f"{run_sync(RunDirectory.find(run))} journal lines sent")
