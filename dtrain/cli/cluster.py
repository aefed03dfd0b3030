"""`dtrain submit` and `dtrain status`."""

import itertools
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import values, with_eval
from dtrain.errors import UserError
from dtrain.terminal import say


def submit(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG [key.sub=value ...]", help="or, after `--`, options of the evaluation or sweep"),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="ranks a node; GPUs where the cluster knows of any")] = 8,
    time: Annotated[str, typer.Option(help="[D-]HH:MM:SS of one start; a training that needs more is requeued")] = "",
    partition: Annotated[str | None, typer.Option(help="as sbatch's own")] = None,
    account: Annotated[str | None, typer.Option(help="as sbatch's own")] = None,
    qos: Annotated[str | None, typer.Option(help="as sbatch's own")] = None,
    constraint: Annotated[str | None, typer.Option(help="as sbatch's own")] = None,
    after: Annotated[str | None, typer.Option(metavar="JOB", help="start when this job has ended well")] = None,
    evaluate: Annotated[str | None, typer.Option(metavar="RUN", help="evaluate this run instead of training")] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="RUN", help="a job array, one task for each combination of settings")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="your copy of slurm/train.sbatch, evaluate or sweep")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the batch script and submit nothing")] = False,
) -> None:
    """Submit a training to SLURM, refusing at once what could not start.

    Also: dtrain submit --evaluate RUN --time 2:00:00 -- --n 50000
    """
    from dtrain.cluster import slurm

    if not time:
        raise UserError("--time is missing: give the job's limit as HH:MM:SS or D-HH:MM:SS")
    request = slurm.Request(nodes, gpus_per_node, time, partition, account, qos, constraint, after)
    words = arguments or []
    if evaluate and sweep:
        raise UserError("--evaluate and --sweep are two jobs; submit one after the other")
    if evaluate:
        job, about = _evaluation(evaluate, words, after)
    elif sweep:
        job, about = _sweep(sweep, words, after)
    elif words:
        job, about = _training(words, request)
    else:
        raise UserError("say what to submit: a CONFIG, --evaluate RUN or --sweep RUN")
    script = slurm.render(job, request, template)
    typer.echo(about, err=dry_run)
    if dry_run:
        typer.echo(script, nl=False)
        return
    number = slurm.submit(job, script)
    say(f"job {number}: {nodes} nodes with {gpus_per_node} ranks on each, {time} at a time")
    say(f"script: {job.log(number).with_suffix('.sbatch')}")
    say(f"log: {job.log(f'{number}_*' if job.parts else number)}")
    say(f"run: {job.run}")


def status(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN ...]", help="default: all under runs/")] = None,
) -> None:
    """How runs are doing, from their journals and, where there is a SLURM, its queue."""
    from dtrain.cluster.status import known_runs, table

    say(table(known_runs(runs or [])))


def _training(words: list[str], request):
    from dtrain import config as configuration
    from dtrain.cluster import slurm
    from dtrain.cluster.status import check_free
    from dtrain.run import RunDirectory
    from dtrain.training.check import check_start

    config = configuration.load(words[0], words[1:])
    about = check_start(config, request.ranks)
    if request.after is None:
        check_free(RunDirectory(config.run.path))
    # A job that does not say how many has as many as its CPUs allow: two a rank are one for the step and one for data.
    asked = 1 if config.data.workers is None else config.data.workers
    return slurm.training(Path(words[0]), words[1:], config.run.path, asked), about


def _evaluation(run: str, words: list[str], after: str | None):
    from dtrain.cluster import slurm

    path = _evaluated(run, after)
    given = _options("evaluate", run, words)
    raw = given.pop("raw")
    for name in ("run", "step", "as_json"):
        del given[name]
    _judged(path, given, raw)
    return slurm.evaluation(path, words), f"{path} will be evaluated"


def _sweep(run: str, words: list[str], after: str | None):
    """One task a combination: the options that take lists give each task one value, the others go to all."""
    from dtrain.cluster import slurm
    from dtrain.evaluation.combinations import AXES, OPTION_OF, checkpoints_of, combinations, configured
    from dtrain.run import RunDirectory

    path = _evaluated(run, after)
    given = {k: v for k, v in _options("sweep", run, words).items() if v is not None and k != "run"}
    if "checkpoints" in given and after is None:  # else there will be others when the job starts
        given["checkpoints"] = ",".join(map(str, checkpoints_of(RunDirectory(path), given["checkpoints"])))
    lists = {option: given.pop(option).split(",") for axis in AXES if (option := OPTION_OF.get(axis, axis)) in given}
    if not lists:
        raise UserError("give the sweep something to vary, such as: -- --steps 10,50 --eta 0,1")
    parts = [[f"--{o}={v}" for o, v in zip(lists, part, strict=True)] for part in itertools.product(*lists.values())]
    rest = [f"--{name}={value}" for name, value in given.items()]
    if (config := _judged(path, {k: v for k, v in given.items() if k != "out"})) is not None:
        axes = {axis: values(",".join(lists[o])) for axis in AXES if (o := OPTION_OF.get(axis, axis)) in lists}
        for setting in combinations(axes):
            configured(config, setting)
    about = (
        f"{path} will be evaluated at {len(parts)} combinations; the table then: dtrain sweep {run} {' '.join(words)}"
    )
    return slurm.sweep(path, rest, parts), about


def _evaluated(run: str, after: str | None) -> Path:
    """The run's directory. One that a job has yet to begin is taken by its path."""
    from dtrain.checkpoint.directory import complete
    from dtrain.run import RunDirectory

    if after is not None and not (Path(run) / "config.yaml").exists():
        return Path(run) if "/" in run else Path("runs") / run
    found = RunDirectory.find(run)
    if after is None and not complete(found.checkpoints):
        raise UserError(f"{found.path} has no complete checkpoint yet; name the job that makes one with --after")
    return found.path


def _judged(run: Path, given: dict, raw: bool = False):
    """The run's config with these settings, so that a wrong one ends no waiting job; None before it begins."""
    from dtrain.evaluation.requirements import check_evaluation
    from dtrain.run import RunDirectory

    directory = RunDirectory(run)
    if not directory.config_file.exists():
        return None
    config = with_eval(directory.config(), given, raw)
    check_evaluation(config)
    return config


def _options(command: str, run: str, words: list[str]) -> dict:
    """The options as `dtrain evaluate` or `dtrain sweep` reads them, so that a mistake ends no waiting job."""
    from dtrain.cli.evaluation import evaluate, sweep

    reads = typer.Typer()
    reads.command(command)({"evaluate": evaluate, "sweep": sweep}[command])
    return typer.main.get_command(reads).make_context(command, [run, *words]).params
