"""`dtrain checkpoints list | verify | prune | export | reconstruct`."""

from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import RunName, Sigma
from dtrain.cli.progress import progress
from dtrain.errors import DAMAGED, UserError
from dtrain.terminal import say

checkpoints = typer.Typer(help="List, verify, prune and export a run's checkpoints.", no_args_is_help=False)


@checkpoints.command("list")
def list_checkpoints(run: RunName) -> None:
    """Step, images, size and last metric of every checkpoint."""
    from dtrain.checkpoint.inspect import table
    from dtrain.run import RunDirectory

    say(table(RunDirectory.find(run)))


@checkpoints.command("verify")
def verify_checkpoints(run: RunName) -> None:
    """Read every byte of every checkpoint and compare checksums; exit code 1 where one is damaged."""
    from dtrain.checkpoint.inspect import verify
    from dtrain.run import RunDirectory

    with progress("verifying") as on_checkpoint:
        damaged, report = verify(RunDirectory.find(run), on_checkpoint)
    say(report)
    if damaged:
        raise typer.Exit(DAMAGED)


@checkpoints.command("prune")
def prune_checkpoints(
    run: RunName,
    keep_last: Annotated[int, typer.Option(min=1)] = 1,
    keep_every: Annotated[int | None, typer.Option(min=1, help="also keep multiples of this step")] = None,
    keep_best: Annotated[str | None, typer.Option(help="also keep the best by this metric, such as fd_pixels")] = None,
) -> None:
    """Delete old checkpoints; the newest one that is whole always stays."""
    from dtrain.checkpoint.inspect import prune
    from dtrain.run import RunDirectory

    say(prune(RunDirectory.find(run), keep_last, keep_every, keep_best))


@checkpoints.command("export")
def export_checkpoint(
    run: RunName,
    out: Annotated[Path, typer.Option(help="the folder to write, new or empty")],
    step: Annotated[int | None, typer.Option(min=0, help="default: the newest")] = None,
    ema: Annotated[int | None, typer.Option(min=0, help="EMA profile; default: the raw weights")] = None,
    sigma: Sigma = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    format: Annotated[
        str,
        typer.Option(
            help="safetensors, for `dtrain.load`; published, for the papers' programs; or diffusers: a whole pipeline"
        ),
    ] = "safetensors",
    merge: Annotated[bool, typer.Option("--merge", help="of low-rank adapters the whole model, base and all")] = False,
) -> None:
    """Write a checkpoint's weights for other programs, with a README.md that draws a picture with them."""
    from dtrain.checkpoint.export import export
    from dtrain.checkpoint.frozen_base import load_merged
    from dtrain.run import RunDirectory

    if sigma is not None and ema is not None:
        raise UserError(f"--sigma {sigma} is an average of its own; leave out --ema")
    weights = ema if sigma is None else {"sigma_rel": sigma}
    say(export(RunDirectory.find(run), out, step, weights, dtype, format, load_merged if merge else None))


@checkpoints.command("reconstruct")
def reconstruct_average(
    run: RunName,
    sigma: Annotated[float, typer.Option(help="σ_rel: its width as a share of the steps so far, such as 0.13")],
    out: Annotated[Path, typer.Option(help="the folder to write, new: a checkpoint, for run.init_from")],
    at: Annotated[int | None, typer.Option(min=1, help="a step that has a snapshot; default: the newest")] = None,
) -> None:
    """Make an average of the weights of any width, of the snapshots of a run with power-function averages."""
    from dtrain.checkpoint.averages import reconstruct
    from dtrain.run import RunDirectory

    say(reconstruct(RunDirectory.find(run), sigma, at, out))
