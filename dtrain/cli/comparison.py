"""`dtrain compare`."""

from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import Features, NumSamples, Resize, Weights, this_command, values, with_eval
from dtrain.cli.evaluation import nothing_drawn, say_on_rank_0
from dtrain.cli.progress import progress
from dtrain.errors import UserError
from dtrain.interrupt import ctrl_c
from dtrain.terminal import say

STEPS, PICTURE_STEPS = "1,2,4,8,16,32,64", "5,25,50,999"
OWN = "own"


def steps_in(text: str, option: str) -> list[int]:
    """`1,2,4` as numbers, each once; `own`: none. Raises UserError."""
    found = [] if text == OWN else values(text)
    if not all(type(value) is int and value > 0 for value in found):
        raise UserError(f"{option} {text}: numbers of steps such as {STEPS}, or {OWN} for each run's own alone")
    return list(dict.fromkeys(found))


def compared_by(config, chosen: dict):
    """The run's config with the `eval` that it is compared by: of an autoencoder new pictures."""
    images = {} if config.objective.diffuses else {"images": "prior"}
    return with_eval(config, chosen | images, raw=False)


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="run directories, or names under runs/")],
    n: NumSamples = None,
    steps: Annotated[
        str, typer.Option(help=f"of the curve, for runs that can take them; {OWN}: each run's own alone")
    ] = STEPS,
    features: Features = None,
    weights: Weights = None,
    resize: Resize = None,
    labels: Annotated[str | None, typer.Option(help="data or uniform")] = None,
    label: Annotated[int | None, typer.Option(min=0, help="the class of the pictures; default: 0")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="what the pictures show, of runs told in words; default: a held-out caption")
    ] = None,
    picture_steps: Annotated[
        str, typer.Option(help=f"of the pictures, for runs that can take them; {OWN}: each run's own alone")
    ] = PICTURE_STEPS,
    out: Annotated[Path | None, typer.Option(help="a folder; default: comparison in the first run's directory")] = None,
) -> None:
    """Compare runs by quality, diversity and speed: one HTML page, and the numbers beside it.

    Each at its newest checkpoint and its own sampler settings, with as many samples, the same features and the same
    held-out images for all, timed on this device. What an earlier start has computed is not computed again.
    """
    from dtrain import distributed
    from dtrain.evaluation.comparable import METRICS, Member, named

    found = named(runs)
    wanted, columns = steps_in(steps, "--steps"), steps_in(picture_steps, "--picture-steps")
    chosen = {"n": n, "features": features, "weights": weights, "resize": resize, "labels": labels}
    chosen |= {"metrics": ",".join(METRICS), "bootstrap": 0}
    members = [Member(name, run, compared_by(run.config(), chosen)) for name, run in found]
    place = out or members[0].run.path / "comparison"
    ctrl_c.at_once(nothing_drawn)
    distributed.prepare()
    distributed.initialize()
    from dtrain.evaluation import comparison
    from dtrain.evaluation.comparison_pictures import Asked
    from dtrain.evaluation.requirements import about_prior
    from dtrain.report import comparison as pages
    from dtrain.tracking.tracker import ship, ship_comparison

    asked = Asked(tuple(columns), label, prompt)

    for member in members:
        if member.config.eval.images == "prior" and (about := about_prior(member.config)):
            say_on_rank_0(f"{member.name}: {about}")
    ctrl_c.kept(lambda: f"what is computed is kept in the runs and in {place}; go on with: {this_command()}")
    with progress("comparing") as on_progress:
        measured = comparison.compare(members, wanted, place, asked, on_progress, say_on_rank_0)

    def conclude() -> None:
        whole = pages.with_training(measured)
        page, numbers = pages.write(whole, place)
        say(pages.in_words(whole))
        say(f"numbers: {numbers}")
        compared = [member.run for member in members]
        unsent = next(filter(None, map(ship, compared)), None)  # their sweeps; one failure is told once
        if unsent := unsent or ship_comparison(compared, *pages.for_mlflow(whole), [page, numbers]):
            say(unsent)
        say(f"open {page}")

    distributed.on_rank_0(conclude)
    distributed.finalize()
