"""The `dtrain` command. Each command imports what it needs when it runs, so that `--help` is quick."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from dtrain.errors import DAMAGED, STOPPED, USER_ERROR, UserError
from dtrain.training.output import say_error

UsageError = typer.BadParameter.__base__  # typer has a click of its own and does not export this class

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train diffusion models at cluster scale and review their FID curves.",
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value ...]", help="override config keys")]
LOG_SECONDS = 30.0  # between two lines about progress where there is no terminal
METRICS_HELP = "fd,fd_infinity,kid,precision,recall,is,bpd"
FEATURES_HELP = "inception, effnet_lite0, pixels, a TorchScript file, or auto: the first that is here"
RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run directory, or a name under runs/")]


@app.command()
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

    distributed.set_thread_counts()
    from dtrain.training.loop import train as run_training

    outcome = run_training(settings)
    if distributed.rank() == 0:
        print(summary(settings.run.path))
    distributed.finalize()
    if outcome == "stopped":
        raise typer.Exit(STOPPED)


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="a folder of class folders, an .npz, a manifest.json, or sklearn:digits"),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DEST")],
    holdout: Annotated[int, typer.Option(min=0, help="samples set apart for evaluation")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="of the shuffle and the split")] = 0,
    shard_samples: Annotated[int | None, typer.Option(min=1, help="samples a shard; default: at most 1,000")] = None,
    shard_bytes: Annotated[int | None, typer.Option(min=1, help="end a shard that has so many bytes")] = None,
    format: Annotated[str | None, typer.Option(help="png, jpeg or webp; default: files as they are")] = None,
) -> None:
    """Make WebDataset shards with manifests: DEST/train and, with --holdout, DEST/holdout."""
    from dtrain.data.pack import pack as run

    with _progress("packing") as on_sample:
        print(run(source, destination, holdout, seed, shard_samples, shard_bytes, format, on_sample))


@app.command()
def index(
    shards: Annotated[
        list[str],
        typer.Argument(metavar="SHARDS...", help="folders of .tar shards, globs, brace patterns, @lists, or URLs"),
    ],
    out: Annotated[Path | None, typer.Option(help="the manifest to write; default: manifest.json beside them")] = None,
) -> None:
    """Write the manifest of shards that exist."""
    from dtrain.data.indexing import index as run

    manifest = run(shards, out)
    print(
        f"{manifest.path}: {manifest.samples:,} samples in {len(manifest.shards)} shards ({', '.join(manifest.fields)})"
    )


@app.command()
def verify(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="a manifest.json, or the folder it is in")],
    shards: Annotated[str | None, typer.Option(help="their folder or URL; default: beside the manifest")] = None,
) -> None:
    """Compare every byte of every shard with the manifest; exit code 1 where one is damaged, each is named."""
    from dtrain.data.manifest import load
    from dtrain.data.progress import bytes_bar
    from dtrain.data.verify import verify as run

    found = load(manifest / "manifest.json" if manifest.is_dir() else manifest)
    with bytes_bar(f"verifying {len(found.shards):,} shards", sum(s.bytes for s in found.shards)) as progress:
        problems = run(found, shards or found.path.parent, progress)
    for place, problem in problems.items():
        print(f"{place} {problem}")
    print(f"{found.path}: {len(problems):,} of {len(found.shards):,} shards damaged")
    if problems:
        raise typer.Exit(DAMAGED)


@app.command()
def evaluate(
    run: RunName,
    n: Annotated[int | None, typer.Option(min=2, help="number of samples; default: eval.num_samples")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="DDIM steps")] = None,
    eta: Annotated[str | None, typer.Option(help="of ddim: 0 to 1, or sigma_hat")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, ancestral, dpmpp_2m, heun, euler")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="1 is none")] = None,
    ema: Annotated[int | None, typer.Option(min=0, help="EMA profile")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="the raw weights instead of an EMA")] = False,
    step: Annotated[int | None, typer.Option(min=0, help="the checkpoint to take; default: the newest")] = None,
    metrics: Annotated[str | None, typer.Option(help=METRICS_HELP)] = None,
    features: Annotated[str | None, typer.Option(help=FEATURES_HELP)] = None,
    weights: Annotated[str | None, typer.Option(help="Inception's weight file, or its folder")] = None,
    reference: Annotated[str | None, typer.Option(help="an .npz of mu and sigma; default: data.holdout")] = None,
    labels: Annotated[str | None, typer.Option(help="data or uniform")] = None,
    bootstrap: Annotated[int | None, typer.Option(min=0, help="resamplings for an interval of fd")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")] = False,
) -> None:
    """Draw samples from a run's checkpoint and compare them with its held-out split.

    Killed and started again with the same settings it goes on where it was.
    """
    from dtrain import distributed
    from dtrain.run import RunDirectory

    directory = RunDirectory.find(run)
    chosen = {"num_samples": n, "steps": steps, "eta": eta, "sampler": sampler, "guidance": guidance, "ema": ema}
    chosen |= {"features": features, "weights": weights, "reference": reference, "labels": labels}
    chosen |= {"bootstrap": bootstrap}
    chosen["metrics"] = metrics.split(",") if metrics else None
    settings = _with_eval(directory.config(), {k: v for k, v in chosen.items() if v is not None}, raw)
    distributed.set_thread_counts()
    distributed.initialize()
    from dtrain.evaluation.evaluate import evaluate as run_evaluation
    from dtrain.evaluation.evaluate import open_sampler, scratch_of, weights_name
    from dtrain.evaluation.reference import Reference

    device = distributed.device()
    drawn, at_step, images = open_sampler(directory, settings, weights_name(settings), device, step)
    with _progress("reading the reference") as on_block:
        compared = Reference(settings, device, on_block)
    scratch = scratch_of(directory, settings, at_step, compared)
    with _progress("sampling") as on_block:
        found, context = run_evaluation(drawn, settings, compared, on_block, scratch)
    if distributed.rank() == 0:
        scratch.remove()
        shown = "  ".join(f"{k} {v:.4f}" for k, v in found.items())
        print(f"{directory.path} step {at_step}: {shown}  ({context['n']} samples of {context['ema']})")
        if as_json:
            print(json.dumps({"step": at_step, "images": images, "metrics": found, "context": context}))
    distributed.finalize()


@app.command()
def sweep(
    run: RunName,
    checkpoints: Annotated[str | None, typer.Option(help="steps, or all; default: the newest")] = None,
    ema: Annotated[str | None, typer.Option(help="EMA profiles, and raw for the weights themselves")] = None,
    steps: Annotated[str | None, typer.Option(help="DDIM steps, such as 5,10,20,50")] = None,
    eta: Annotated[str | None, typer.Option(help="such as 0,0.5,1")] = None,
    guidance: Annotated[str | None, typer.Option(help="such as 1,1.5,2")] = None,
    seeds: Annotated[str | None, typer.Option(help="such as 0,1,2; the table has their mean")] = None,
    n: Annotated[int | None, typer.Option(min=2, help="number of samples; default: eval.num_samples")] = None,
    metrics: Annotated[str | None, typer.Option(help=METRICS_HELP)] = None,
    features: Annotated[str | None, typer.Option(help=FEATURES_HELP)] = None,
    weights: Annotated[str | None, typer.Option(help="Inception's weight file, or its folder")] = None,
    out: Annotated[Path | None, typer.Option(help="the heat map; default: sweep.png in the run directory")] = None,
) -> None:
    """Evaluate every combination of lists of settings: a table, a heat map and the best one.

    What RUN/sweep.jsonl holds already is not computed again.
    """
    from dtrain import distributed
    from dtrain.run import RunDirectory

    directory = RunDirectory.find(run)
    chosen = {"num_samples": n, "metrics": metrics.split(",") if metrics else None}
    chosen |= {"features": features, "weights": weights}
    settings = _with_eval(directory.config(), {k: v for k, v in chosen.items() if v is not None}, raw=False)
    distributed.set_thread_counts()
    distributed.initialize()
    from dtrain.evaluation import sweep as sweeps
    from dtrain.evaluation.features import metric_name

    lists = {"ema": ema, "guidance": guidance, "eta": eta, "steps": steps, "seed": seeds}
    axes = {name: _values(text) for name, text in lists.items() if text}
    if checkpoints:
        axes["checkpoint"] = sweeps.checkpoints_of(directory, checkpoints)
    with _progress("sampling") as on_block:
        lines = sweeps.sweep(directory, settings, axes, on_block)
    if distributed.rank() == 0:
        rows, metric, name = sweeps.summary(lines), settings.eval.metrics[0], lines[0]["context"]["features"]
        print(sweeps.table(rows))
        winner = sweeps.best(rows, metric, name)
        key = metric_name(metric, name)
        shown = ", ".join(f"{k} {v}" for k, v in winner.setting.items()) or "the run's own settings"
        print(f"best {key}: {winner.metrics[key]:.4f} at {shown}  ({settings.eval.num_samples} samples)")
        picture = out or directory.path / "sweep.png"
        if sweeps.heat_map(rows, key, picture):
            print(f"heat map: {picture}")
    distributed.finalize()


def _values(text: str) -> list:
    """`5,10` as numbers; what is no number stays a word for its key to judge."""
    import yaml

    return [yaml.safe_load(part) for part in text.split(",")]


@app.command()
def reference(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="a folder with a manifest.json, or a manifest")],
    features: Annotated[str, typer.Option(help=FEATURES_HELP)] = "auto",
    weights: Annotated[str | None, typer.Option(help="Inception's weight file, or its folder")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="default: that of the first image")] = None,
    out: Annotated[Path | None, typer.Option(help="the .npz to write; default: beside the shards")] = None,
) -> None:
    """Compute once what evaluations compare with, and keep it beside the shards, where they look for it."""
    from dtrain import distributed

    distributed.set_thread_counts()
    distributed.initialize()
    from dtrain.evaluation.reference import make

    with _progress("reading") as on_block:
        done = make(shards, features, weights, image_size, out, on_block)
    if distributed.rank() == 0:
        print(done)
    distributed.finalize()


@app.command()
def sample(
    run: RunName,
    n: Annotated[int, typer.Option(min=1, help="number of images")] = 64,
    steps: Annotated[int | None, typer.Option(min=1, help="DDIM steps")] = None,
    eta: Annotated[str | None, typer.Option(help="of ddim: 0 to 1, or sigma_hat")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, ancestral, dpmpp_2m, heun, euler")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="1 is none")] = None,
    ema: Annotated[int | None, typer.Option(min=0, help="EMA profile")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="the raw weights instead of an EMA")] = False,
    label: Annotated[int | None, typer.Option(min=0, help="one class; default: all in turn")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    step: Annotated[int | None, typer.Option(min=0, help="the checkpoint to take; default: the newest")] = None,
    out: Annotated[Path, typer.Option(help="a .png grid, or .npz with `images` and `labels`")] = Path("samples.png"),
) -> None:
    """Draw images from a run's checkpoint."""
    from dtrain import distributed
    from dtrain.run import RunDirectory

    directory = RunDirectory.find(run)
    chosen = {"steps": steps, "eta": eta, "sampler": sampler, "guidance": guidance, "ema": ema, "seed": seed}
    settings = _with_eval(directory.config(), {k: v for k, v in chosen.items() if v is not None}, raw)
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out} must end in .png or .npz")
    classes = settings.model.num_classes
    if label is not None and label >= max(1, classes):
        raise UserError(f"--label {label}: the model of {directory.path} has {classes} classes, counted from 0")
    distributed.set_thread_counts()
    from dtrain.evaluation.sample import draw_to_file

    with _progress("sampling") as on_block:
        draw_to_file(directory, settings, n, label, step, out, on_block)
    if distributed.rank() == 0:
        print(f"{n} images in {out}")
    distributed.finalize()


@app.command()
def sync(run: RunName) -> None:
    """Send journal lines that MLflow does not have yet."""
    from dtrain.run import RunDirectory
    from dtrain.tracking.tracker import sync as run_sync

    print(f"{run_sync(RunDirectory.find(run))} journal lines sent")


data = typer.Typer(help="Prove what was trained on, and measure how fast data comes.", no_args_is_help=False)
app.add_typer(data, name="data")


@data.command("audit")
def audit_data(run: RunName) -> None:
    """Replay the order of what the journal says was trained; exit code 1 where it contradicts the order."""
    from dtrain.data.audit import audit
    from dtrain.run import RunDirectory

    found = audit(RunDirectory.find(run))
    print(found)
    if found.problems:
        raise typer.Exit(DAMAGED)


@data.command("bench")
def bench_data(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, see configs/")],
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="for all stages together")] = 10.0,
) -> None:
    """Images a second of each stage of one loader process, and which one limits."""
    from dtrain import config as configuration
    from dtrain.data.bench import bench, report

    print(report(bench(configuration.load(config, overrides or []), seconds)))


checkpoints = typer.Typer(help="List, verify, prune and export a run's checkpoints.", no_args_is_help=False)
app.add_typer(checkpoints, name="checkpoints")


@checkpoints.command("list")
def list_checkpoints(run: RunName) -> None:
    """Step, images, size and last metric of every checkpoint."""
    from dtrain.checkpoint.inspect import table
    from dtrain.run import RunDirectory

    print(table(RunDirectory.find(run)))


@checkpoints.command("verify")
def verify_checkpoints(run: RunName) -> None:
    """Read every byte of every checkpoint and compare checksums; exit code 1 where one is damaged."""
    from dtrain.checkpoint.inspect import verify
    from dtrain.run import RunDirectory

    with _progress("verifying") as on_checkpoint:
        damaged, report = verify(RunDirectory.find(run), on_checkpoint)
    print(report)
    if damaged:
        raise typer.Exit(DAMAGED)


@checkpoints.command("prune")
def prune_checkpoints(
    run: RunName,
    keep_last: Annotated[int, typer.Option(min=1)] = 1,
    keep_every: Annotated[int | None, typer.Option(min=1, help="also keep multiples of this step")] = None,
    keep_best: Annotated[str | None, typer.Option(help="also keep the lowest of this metric")] = None,
) -> None:
    """Delete old checkpoints; the newest one that is whole always stays."""
    from dtrain.checkpoint.inspect import prune
    from dtrain.run import RunDirectory

    print(prune(RunDirectory.find(run), keep_last, keep_every, keep_best))


@checkpoints.command("export")
def export_checkpoint(
    run: RunName,
    out: Annotated[Path, typer.Option(help="the folder to write")],
    step: Annotated[int | None, typer.Option(min=0, help="default: the newest")] = None,
    ema: Annotated[int | None, typer.Option(min=0, help="EMA profile; default: the raw weights")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    format: Annotated[str, typer.Option(help="safetensors, or diffusers")] = "safetensors",
) -> None:
    """Write a checkpoint's weights under the model's own parameter names."""
    from dtrain.checkpoint.export import export
    from dtrain.run import RunDirectory

    print(export(RunDirectory.find(run), out, step, ema, dtype, format))


def _with_eval(config, chosen: dict, raw: bool):
    """The config with other `eval` settings, validated like the file's own."""
    from dtrain import config as configuration

    tree = config.model_dump(mode="json")
    tree["eval"] |= chosen | ({"ema": None} if raw else {})
    return configuration.validate(tree, "the command line", [f"eval.{k}" for k in chosen])


def _progress(what: str):
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


def main(command: str | None = None) -> None:
    """Entry point. A mistake of the user's ends in one line and exit code 2, on rank 0 only where all ranks make it."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if command is not None:  # launch/train.py is `dtrain train`
        arguments = [command, *arguments]
    try:
        code = app(args=arguments, prog_name="dtrain", standalone_mode=False)
    except UserError as e:
        say_error(str(e))
        code = USER_ERROR
    except UsageError as e:
        hint = "; settings are given as key.sub=value" if arguments[:1] == ["train"] else ""
        say_error(f"{e.format_message().rstrip('.')}{hint}")
        code = USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.stdout.flush()
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
