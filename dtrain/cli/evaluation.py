"""`dtrain evaluate | sweep | reference | report`."""

import gc
import json
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import (
    FEATURES_HELP,
    Bootstrap,
    BpdClip,
    Classifier,
    ClipModel,
    Ema,
    Eta,
    Features,
    Guidance,
    GuideWith,
    Images,
    Metrics,
    NumSamples,
    Raw,
    Resize,
    RunName,
    SamplerName,
    Sigma,
    Step,
    Steps,
    Weights,
    this_command,
    values,
    with_eval,
)
from dtrain.cli.progress import progress
from dtrain.errors import UserError
from dtrain.interrupt import ctrl_c
from dtrain.terminal import printable, say, tell


def nothing_drawn() -> str:
    return f"this start has drawn nothing yet; go on with: {this_command()}"


def say_on_rank_0(line: str | None) -> None:
    from dtrain import distributed

    if line and distributed.rank() == 0:
        tell(line)


def evaluate(
    run: RunName,
    n: NumSamples = None,
    steps: Steps = None,
    eta: Eta = None,
    sampler: SamplerName = None,
    guidance: Guidance = None,
    guide_with: GuideWith = None,
    ema: Ema = None,
    sigma: Sigma = None,
    raw: Raw = False,
    step: Step = None,
    metrics: Metrics = None,
    clip_model: ClipModel = None,
    classifier: Classifier = None,
    features: Features = None,
    weights: Weights = None,
    resize: Resize = None,
    reference: Annotated[str | None, typer.Option(help="an .npz of mu and sigma; default: data.holdout")] = None,
    labels: Annotated[str | None, typer.Option(help="data or uniform")] = None,
    bootstrap: Bootstrap = None,
    bpd_clip: BpdClip = None,
    images: Images = None,
    init: Annotated[
        str | None, typer.Option(metavar="FILE", help="weights that somebody published; RUN is then a config file")
    ] = None,
    init_weights: Annotated[str | None, typer.Option(help="ema or model, of a file that holds both")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object as the last line")] = False,
) -> None:
    """Draw samples from a run's checkpoint and compare them with its held-out split.

    Killed and started again with the same settings it goes on where it was. The result is kept beside the run's
    journal and sent to MLflow, also while the run trains. With --init there is no run: the result is printed alone.
    """
    from dtrain import distributed
    from dtrain.config import load
    from dtrain.position import Position
    from dtrain.run import RunDirectory

    chosen = {"n": n, "steps": steps, "eta": eta, "sampler": sampler, "guidance": guidance, "ema": ema}
    chosen |= {"sigma": sigma, "features": features, "weights": weights, "reference": reference, "labels": labels}
    chosen |= {"bootstrap": bootstrap, "metrics": metrics, "bpd_clip": bpd_clip, "resize": resize}
    chosen |= {"clip_model": clip_model, "classifier": classifier, "guide_with": guide_with, "images": images}
    directory = None if init else RunDirectory.find(run)
    own = load(run) if init else directory.config()
    settings = with_eval(own, chosen, raw or init is not None)
    ctrl_c.at_once(nothing_drawn)
    distributed.prepare()
    distributed.initialize()
    from dtrain.evaluation import floor
    from dtrain.evaluation.evaluate import differences, scratch_of
    from dtrain.evaluation.evaluate import evaluate as run_evaluation
    from dtrain.evaluation.opened import open_generator, open_published
    from dtrain.evaluation.reference import Reference
    from dtrain.evaluation.requirements import about_prior
    from dtrain.tracking.best import training_evaluations
    from dtrain.tracking.tracker import record_evaluation

    device = distributed.device()
    if init:
        opened = open_published(settings, init, init_weights, device)
    else:
        opened = open_generator(directory, settings, device, step)
    with progress("reading the reference") as on_block:
        compared = Reference.open(settings, device, on_block)
    say_on_rank_0(compared.kept)
    say_on_rank_0(compared.about)
    if images == "prior":  # of a config the training has said it
        say_on_rank_0(about_prior(settings))
    scratch = None if init else scratch_of(directory, settings.eval, opened.checkpoint, compared)
    if scratch is not None:
        of = f"of {settings.eval.num_samples:,} samples"
        ctrl_c.kept(lambda: f"{scratch.count():,} {of} are kept; go on with: {this_command()}")
    with progress("sampling, evaluations of the network") as on_progress:
        known = (lambda: floor.lines_of(directory)) if directory else list
        lowest = floor.measure(opened.generator.first_stage, settings, compared, known, device, on_progress)
        found, context = run_evaluation(opened.generator, settings, compared, on_progress, scratch)

    def conclude() -> None:
        how, unsent = context, None
        which, about = printable(init), {"weights": opened.checkpoint}  # by their sha256
        if directory is not None:
            changed = differences(training_evaluations(directory.journal_file), own.eval, settings.eval, context)
            how = context | ({"differs": changed} if changed else {})
            unsent = record_evaluation(directory, Position(opened.step, opened.images), found, how, lowest)
            scratch.remove()
            which, about = f"{directory.path} step {opened.step}", {"step": opened.step, "images": opened.images}
        if lowest:
            say(str(lowest))
        shown = "  ".join(f"{k} {v:.4f}" for k, v in found.items())
        say(f"{which}: {shown}  ({how['n']} samples{'' if init else ' of ' + how['ema']})")
        if unsent:
            say(unsent)
        if as_json:
            print(json.dumps(about | {"metrics": found, "context": how}))

    distributed.on_rank_0(conclude)
    distributed.finalize()


def sweep(
    run: RunName,
    checkpoints: Annotated[str | None, typer.Option(help="steps, or all; default: the newest")] = None,
    ema: Annotated[str | None, typer.Option(help="EMA profiles, and raw for the weights themselves")] = None,
    sigma: Annotated[str | None, typer.Option(help="σ_rel of averages made of snapshots, such as 0.05,0.1,0.2")] = None,
    steps: Annotated[str | None, typer.Option(help="DDIM steps, such as 5,10,20,50")] = None,
    eta: Annotated[str | None, typer.Option(help="such as 0,0.5,1")] = None,
    guidance: Annotated[str | None, typer.Option(help="such as 1,1.5,2")] = None,
    seeds: Annotated[str | None, typer.Option(help="such as 0,1,2; the table has their mean")] = None,
    n: NumSamples = None,
    metrics: Metrics = None,
    clip_model: ClipModel = None,
    classifier: Classifier = None,
    features: Features = None,
    weights: Weights = None,
    resize: Resize = None,
    bootstrap: Bootstrap = None,
    bpd_clip: BpdClip = None,
    images: Images = None,
    out: Annotated[Path | None, typer.Option(help="the heat map; default: sweep.png in the run directory")] = None,
) -> None:
    """Evaluate every combination of lists of settings: a table, a heat map and the best one.

    What RUN/sweep.jsonl holds already is not computed again.
    """
    from dtrain import distributed
    from dtrain.run import RunDirectory

    directory = RunDirectory.find(run)
    chosen = {"n": n, "metrics": metrics, "features": features, "weights": weights, "bootstrap": bootstrap}
    chosen |= {"bpd_clip": bpd_clip, "resize": resize, "clip_model": clip_model, "classifier": classifier}
    chosen["images"] = images
    settings = with_eval(directory.config(), chosen, raw=False)
    ctrl_c.at_once(nothing_drawn)
    distributed.prepare()
    distributed.initialize()
    from dtrain.evaluation import sweep as sweeps
    from dtrain.evaluation.combinations import checkpoints_of
    from dtrain.evaluation.names import is_comparable, metric_name, reconstructed
    from dtrain.tracking.tracker import ship

    lists = {"ema": ema, "guidance": guidance, "eta": eta, "steps": steps, "seed": seeds}
    axes = {name: values(text) for name, text in lists.items() if text}
    if sigma:
        axes["ema"] = [*axes.get("ema", []), *(f"sigma_{width}" for width in values(sigma))]
    if not axes and not checkpoints:
        raise UserError("give the sweep something to vary, such as: --steps 10,50 --eta 0,1")
    if checkpoints:
        axes["checkpoint"] = distributed.on_rank_0(checkpoints_of, directory, checkpoints)
    ctrl_c.kept(
        lambda: (
            f"{sweeps.number_stored(directory)} results are kept in {directory.path}/sweep.jsonl, and samples of "
            f"the combination it was at; go on with: {this_command()}"
        )
    )
    with progress("sweeping") as on_progress:
        lines = sweeps.sweep(directory, settings, axes, on_progress, say_on_rank_0)

    def conclude() -> None:
        rows, metric, context = sweeps.summary(lines), settings.eval.metrics[0], lines[0]["context"]
        say(sweeps.table(rows))
        name, comparable = context["features"], is_comparable(context["features"], context.get("reference_resize"))
        key = metric_name(metric, name, comparable=comparable)
        key = reconstructed(key) if settings.reconstructs else key
        winner = sweeps.best(rows, key)
        shown = ", ".join(f"{k} {v}" for k, v in winner.setting.items()) or "the run's own settings"
        say(f"best {key}: {winner.metrics[key]:.4f} at {shown}  ({settings.eval.num_samples} samples)")
        picture = out or directory.path / "sweep.png"
        try:
            if sweeps.heat_map(rows, key, picture):
                say(f"heat map: {picture}")
        except (OSError, ValueError) as e:  # a ValueError: matplotlib writes no such format
            problem = getattr(e, "strerror", None) or e
            raise UserError(f"cannot write {picture}: {problem}; name a .png in a writable place with --out") from None
        if unsent := ship(directory):
            say(unsent)

    distributed.on_rank_0(conclude)
    distributed.finalize()


def reference(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="a folder with a manifest.json, or a manifest")],
    features: Annotated[str, typer.Option(help=FEATURES_HELP)] = "auto",
    weights: Weights = None,
    resize: Resize = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="default: that of the first image")] = None,
    out: Annotated[Path | None, typer.Option(help="the .npz to write; default: beside the shards")] = None,
    exif: Annotated[str, typer.Option(help="apply or ignore, as data.exif of the runs to compare")] = "apply",
    scaling: Annotated[str, typer.Option(help="bicubic or adm, as data.scaling of the runs to compare")] = "bicubic",
) -> None:
    """Compute once what evaluations compare with, and keep it beside the shards, where they look for it."""
    from dtrain import distributed

    if exif not in ("apply", "ignore"):
        raise UserError(f"--exif {exif} is neither apply nor ignore")
    if scaling not in ("bicubic", "adm"):
        raise UserError(f"--scaling {scaling} is neither bicubic nor adm")
    ctrl_c.at_once("nothing of the reference is kept: it is written when it is whole")
    distributed.prepare()
    distributed.initialize()
    from dtrain.evaluation.reference import make

    with progress("reading") as on_block:
        done = make(shards, features, weights, image_size, out, on_block, exif == "apply", resize, scaling)
    if distributed.rank() == 0:
        say(done)
    distributed.finalize()


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="run directories, or names under runs/")],
    out: Annotated[Path | None, typer.Option(help="default: report.html in the first run's directory")] = None,
    neighbours: Annotated[
        int, typer.Option(min=0, help="samples to show beside the nearest of all training images")
    ] = 0,
    features: Annotated[str | None, typer.Option(help=f"of --neighbours: {FEATURES_HELP}")] = None,
    weights: Weights = None,
) -> None:
    """Write one HTML page about a run, or about several laid over each other; it needs no other file and no network."""
    from dtrain.report import write_report

    if neighbours:
        from dtrain import distributed

        distributed.prepare()
    else:
        gc.disable()  # all that is read stays until the page is written, and cycles are not worth looking for
    say(write_report(runs, out, neighbours, features, weights, progress))
