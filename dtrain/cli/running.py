"""`dtrain train` and `dtrain sync`."""

from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import Overrides, RunName, this_command
from dtrain.errors import STOPPED
from dtrain.interrupt import ctrl_c
from dtrain.terminal import say


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, see configs/")],
    overrides: Overrides = None,
    check: Annotated[bool, typer.Option("--check", help="only say whether it could start, in a second")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="with --check: the number of ranks it would run on")] = 1,
) -> None:
    """Start a run, or go on with it where its directory exists; alone or on every rank a launcher started.

    Ctrl-C stops it after the step it is at, with a checkpoint; a second one ends it at once, without. Exit codes: 0
    finished, 2 a mistake, 75 stopped on request with a checkpoint (run it again), 130 ended by Ctrl-C at once.
    """
    from dtrain import config as configuration

    settings = configuration.load(config, overrides or [])
    if check:
        from dtrain.training.check import check_start

        say(check_start(settings, ranks))
        return

    ctrl_c.at_once("ended before its first step; nothing is lost")
    from dtrain import distributed
    from dtrain.training.record.summary import summary

    distributed.prepare()
    from dtrain.training.run_training import train as run_training

    outcome = run_training(settings)
    ctrl_c.at_once()
    if distributed.rank() == 0:
        if said := summary(settings.run.path):
            say(said)
        if outcome == "stopped":
            say(f"go on with: {this_command()}")
    distributed.finalize()
    if outcome == "stopped":
        raise typer.Exit(STOPPED)


def sync(run: RunName) -> None:
    """Send journal lines that MLflow does not have yet."""
    from dtrain.run import RunDirectory
    from dtrain.tracking.tracker import sync as run_sync

    say(f"{run_sync(RunDirectory.find(run))} journal lines sent")
