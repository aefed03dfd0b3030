"""`dtrain init`."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.progress import progress
from dtrain.interrupt import ctrl_c
from dtrain.terminal import tell


def init(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="what `dtrain pack` left, shards with or without a manifest, or anything it packs"
        ),
    ],
    size: Annotated[
        int | None, typer.Option(min=1, help="side of the images in pixels; default: as data and machine are")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="of the run, and of what is packed: data/NAME; default: the data's")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="to train on; default: those of this machine")] = None,
) -> None:
    """Write a commented config that fits the data and the machine to the terminal, or to a file: > configs/mine.yaml

    Data that are no shards yet are packed into data/NAME first, with a split held out; shards without a manifest are
    indexed there. Steps are taken for some 15 seconds, to say how long a training lasts.
    """
    from dtrain.errors import UserError
    from dtrain.proposal.propose import propose

    if name is not None and not (re.fullmatch(r"[\w.\-]+", name) and name.strip(".")):
        raise UserError(f"--name {name!r}: a name has letters, digits, `_` and `-`, and dots among them")

    file = _file()
    ctrl_c.kept(f"ended before the config was written; where the shell has made {file}, it is empty: start again")
    with progress("packing") as on_sample:
        found = propose(data, size, name, gpus, tell, on_sample)
    tell(found.about.splitlines()[0])
    tell("taking a few steps, to say how long a training lasts")
    with progress("timing steps, seconds") as on_step:
        minutes = found.minutes(file, on_step)
    print(found.text(minutes, file), end="")


def _file() -> str:
    """Where the config will be: what the shell sends this to, where that is a file."""
    target = Path(os.path.realpath("/proc/self/fd/1"))
    if not target.is_file():
        return "configs/mine.yaml"
    return str(target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target)
