"""`dtrain plan` and `dtrain doctor`: before anything waits in a queue."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import Overrides
from dtrain.cli.progress import progress
from dtrain.errors import DAMAGED, UserError
from dtrain.terminal import printable_lines, say, size

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, see configs/")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
GIB = 2**30


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="GiB of one GPU")] = 80,
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="share of the peak that is reached")] = 0.4,
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="of one GPU; default: an H100's in the run's precision")
    ] = None,
    watts: Annotated[float | None, typer.Option(min=0.1, help="of one GPU under load, for the energy")] = None,
    as_json: AsJson = False,
) -> None:
    """Memory at every ZeRO stage, operations, disk, hours and energy of a run, and what to take where it does not fit.

    Nothing is trained and no GPU is needed. Exit code 1 where the config as it is does not fit.
    """
    from dtrain import config as configuration
    from dtrain.cluster.plan import plan as make

    if not all(math.isfinite(number or 0) for number in (gpu_memory, peak_tflops, watts)):
        raise UserError("--gpu-memory, --peak-tflops and --watts are finite numbers")
    settings = configuration.load(config, overrides or [])
    found = make(settings, nodes, gpus_per_node, gpu_memory, mfu, peak_tflops, watts)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        _show(found, nodes, mfu, settings.tracking.carbon_intensity)
    if not (found.fits and found.evaluation_fits):
        raise typer.Exit(DAMAGED)


def _show(p, nodes: int, mfu: float, carbon_intensity: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from dtrain.cluster.energy import said
    from dtrain.data.shared_memory import advice

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 100)

    def gib(size: int) -> str:
        return f"{size / GIB:,.2f}"

    repeated = f" (+ {p.recomputed_per_image / 1e9:,.1f} with checkpointing)"
    console.print(
        f"{p.parameters / 1e6:,.1f} M parameters, {p.flops_per_image / 1e9:,.1f} GFLOPs an image to train{repeated}; "
        f"{p.hours:,.1f} hours on {p.gpus} GPUs at {mfu:.0%} of their peak"
    )
    console.print(said(p.energy, p.gpus, carbon_intensity))
    console.print(
        f"checkpoints of {gib(p.checkpoint)} GiB, up to {p.kept} at once: {gib(p.kept * p.checkpoint)} GiB of disk"
    )
    if p.shared_memory:
        ahead = f"batches made ahead: up to {gib(p.shared_memory)} GiB of a node's /dev/shm"
        if p.shared_memory > p.shared_memory_here:
            ahead += f"; this machine has {gib(p.shared_memory_here)} GiB free: {advice(p.shared_memory)}"
        console.print(ahead)
    table = Table(title="GiB a rank holds, by ZeRO stage", title_justify="left", box=None, padding=(0, 1, 0, 0))
    columns = ("stage", "weights", "masters", "grads", "moments", "averages", "buckets", "in all", "at most")
    for column in (*columns, "micro-batch", "checkpointed"):
        table.add_column(column, justify="right", no_wrap=True)
    for s in p.stages:
        mark, state = "*" if s.stage == p.stage else "", s.state
        parts = (state.weights, state.masters, state.gradients, state.moments, state.averages, state.buckets)
        largest = (str(b or "none") for b in (s.micro_batch, s.micro_batch_checkpointing))
        table.add_row(f"{mark}{s.stage}", *map(gib, (*parts, state.device, s.needed)), *largest)
    console.print(table)
    own = next(s for s in p.stages if s.stage == p.stage)
    console.print(
        f"* the config: micro-batches of {p.micro_batch} of a rank's {p.rows} rows a step; activations take "
        f"{gib(p.activations)} GiB, {gib(p.activations_checkpointing)} with checkpointing"
    )
    if own.state.host:
        console.print(f"offloaded to the host: {gib(own.state.host * (p.gpus // nodes))} GiB a node")
    console.print(
        f"the average gathered for evaluation takes {gib(p.gathered)} GiB; while sampling {gib(p.evaluation)}"
    )
    if p.first_stage.weights:
        f = p.first_stage
        each = f"; it encodes in each step: {f.flops_per_image / 1e9:,.1f} GFLOPs an image" if f.flops_per_image else ""
        console.print(
            f"the first stage takes {gib(f.weights)} GiB, {gib(f.encoding)} more while it encodes a block and "
            f"{gib(f.decoding)} while it decodes one{each}"
        )
    if p.base:
        console.print(f"the frozen base or teacher takes {gib(p.base)} GiB of each rank, and is in no checkpoint")
    if p.text.weights:
        each = f"; in each step: {p.text.flops_per_image / 1e9:,.1f} GFLOPs a caption" if p.text.flops_per_image else ""
        asked = "" if p.text.in_steps else ", while prompts and held-out captions are asked for"
        console.print(f"the text encoders take {gib(p.text.weights)} GiB{asked}{each}")
    for words in p.text.cached:
        every = "a million" if words.samples is None else f"the {words.samples:,} samples"
        whole = size(words.each * (words.samples or 1_000_000))
        shape = f"{words.length} tokens × {words.width} in {words.dtype}, {size(words.each)} a caption"
        console.print(
            f"cached words of conditions.{words.condition}: at most {shape}; of {every} at most {whole} on disk"
        )
    usable = f"of {gib(p.usable)} GiB usable"
    if not p.fits:
        console.print(f"does not fit: {gib(own.needed)} {usable}")
    if not p.evaluation_fits:
        console.print(f"evaluation does not fit: {gib(p.evaluation)} {usable}; take a smaller eval.batch_size")
    if p.fits and p.evaluation_fits:
        console.print(f"fits: {gib(own.needed)} {usable}")
    if p.recommended:
        console.print(f"recommended: {' '.join(p.recommended)}")
    else:
        console.print("nothing fits, with a single image either: take more GPUs, or deepspeed.offload")


def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="a YAML file, see configs/")] = None,
    overrides: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="read every byte of every shard")] = False,
    as_json: AsJson = False,
) -> None:
    """Check versions, GPUs, network, disks, shards, MLflow, weights and time left; say what to do.

    Alone, or on every rank a launcher started. Exit code 1 where something is bad.
    """
    from dtrain import config as configuration
    from dtrain import distributed
    from dtrain.cluster.doctor import examine

    settings = configuration.load(config, overrides or []) if config else None
    with progress("checking") as on_check:
        findings = examine(settings, full, on_check)
    if distributed.rank() != 0:
        distributed.finalize()
        return
    if as_json:
        print(json.dumps([asdict(f) for f in findings]))
    else:
        _show_findings(findings)
        say(verdict(findings))
    if any(f.status == "bad" for f in findings):
        raise typer.Exit(DAMAGED)


def verdict(findings) -> str:
    """The line that somebody in a hurry reads."""
    bad, warnings = ([f.check for f in findings if f.status == status] for status in ("bad", "warning"))
    if bad:
        return f"bad: {', '.join(bad)}"
    return f"nothing is bad; to be looked at: {', '.join(warnings)}" if warnings else "all is well"


def _show_findings(findings) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    colours = {"ok": "green", "warning": "yellow", "bad": "bold red"}
    for f in findings:
        advice = f"\n→ {f.advice}" if f.advice else ""
        found = escape(printable_lines(f.found + advice))
        table.add_row(f"[{colours[f.status]}]{f.status}[/]", f.check, found)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
