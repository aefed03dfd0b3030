"""`dtrain sample | pairs | invert`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import (
    Ema,
    Eta,
    Guidance,
    GuideWith,
    Images,
    Raw,
    RunName,
    SamplerName,
    Sigma,
    Step,
    Steps,
    this_command,
    with_eval,
)
from dtrain.cli.progress import progress
from dtrain.errors import UserError
from dtrain.interrupt import ctrl_c
from dtrain.terminal import printable, say, tell


def check_label(label: int | None, classes: int, run: Path) -> None:
    if label is not None and label >= max(1, classes):
        raise UserError(f"--label {label}: the model of {run} has {classes} classes, counted from 0")


def lines_of(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises UserError for one without, or that is no text."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not lines:
        raise UserError(f"--prompts {path} is empty; write a prompt a line")
    return lines


def scales_of(given: list[str] | None, pictures: Iterable[str]) -> dict[str, float] | None:
    """eval.control_scale of numbers, each for all pictures or as NAME=NUMBER for one. Raises UserError."""
    if not given:
        return None
    found: dict[str, float] = {}
    for one in given:
        name, _, number = one.rpartition("=")
        try:
            found |= dict.fromkeys([name] if name else pictures, float(number))
        except ValueError:
            raise UserError(f"--control-scale {one}: {number!r} is no number") from None
    if not found:
        raise UserError("--control-scale is of a model that pictures control, and this one is told none")
    return found


def sample(
    run: RunName,
    n: Annotated[
        int | None, typer.Option("--n", "-n", min=1, help="number of images; default: 64, or one a prompt")
    ] = None,
    steps: Steps = None,
    eta: Eta = None,
    sampler: SamplerName = None,
    guidance: Guidance = None,
    guide_with: GuideWith = None,
    ema: Ema = None,
    sigma: Sigma = None,
    raw: Raw = False,
    label: Annotated[int | None, typer.Option(min=0, help="one class; default: all in turn")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="what a run with captions is told; several, in turn; default: nothing")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="a text file with a prompt a line")] = None,
    picture: Annotated[
        list[str] | None,
        typer.Option(help="what controls the images: files or folders, in turn; NAME=FILE for one of several"),
    ] = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="pictures are edges, masks … themselves, not images to compute them from")
    ] = False,
    begin: Annotated[
        list[str] | None,
        typer.Option("--from", help="pictures that the images begin at instead of noise: files or folders, in turn"),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="share of the walk that --from leaves to do; default: 0.6, with a mask 1")
    ] = None,
    mask: Annotated[
        list[str] | None, typer.Option(help="white where --from is drawn anew; everywhere else it stays")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="of each step with a mask, so that what is new fits the rest; default: 5")
    ] = None,
    control_scale: Annotated[
        list[str] | None, typer.Option(help="what control is multiplied with, 1 by default, 0: none; NAME=0.5 for one")
    ] = None,
    guess: Annotated[
        bool | None, typer.Option("--guess/--no-guess", help="guidance leads away from the base without control too")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="words that guidance leads away from")] = None,
    images: Images = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    step: Step = None,
    out: Annotated[
        Path, typer.Option(help="a .png grid, an .npz with `images` and `labels`, or a folder for a PNG an image")
    ] = Path("samples.png"),
    format: Annotated[
        str | None, typer.Option(help="png, npz, folder, or adm: an .npz for ADM's evaluator; default: as --out ends")
    ] = None,
) -> None:
    """Draw images from a run's checkpoint."""
    from dtrain import distributed
    from dtrain.run import RunDirectory

    directory = RunDirectory.find(run)
    chosen = {"steps": steps, "eta": eta, "sampler": sampler, "guidance": guidance, "ema": ema, "seed": seed}
    own = directory.config()
    chosen |= {
        "negative_prompt": negative,
        "images": images,
        "guide_with": guide_with,
        "sigma": sigma,
        "guess_mode": guess,
        "control_scale": scales_of(control_scale, own.pictures),
    }
    settings = with_eval(own, chosen, raw)
    check_label(label, settings.model.num_classes, directory.path)
    said = [*(prompt or []), *(lines_of(prompts) if prompts else [])]
    distributed.prepare()
    from dtrain.evaluation.control import of_files
    from dtrain.evaluation.requirements import about_prior
    from dtrain.evaluation.sample import draw_to_file
    from dtrain.evaluation.sample_output import format_of
    from dtrain.evaluation.start import of_files as start_of_files

    kind = format_of(out, format)
    pictures = of_files(picture, settings, as_is) if picture else {}
    start = start_of_files(begin or [], strength, mask or [], repeats, settings.data)
    n = n or max([len(said), len(start.images) if start else 0, *map(len, pictures.values())]) or 64
    ctrl_c.at_once(lambda: f"no image was written; start again with: {this_command()}")
    with progress("sampling, evaluations of the network") as on_progress:
        draw_to_file(directory, settings, n, label, step, out, kind, on_progress, said, pictures, start)
    if distributed.rank() == 0:
        if line := about_prior(settings):
            tell(line)
        say(f"{n} images in {out}")
    distributed.finalize()


def pairs(
    run: RunName,
    destination: Annotated[str, typer.Argument(metavar="DEST", help="a new folder for the shards")],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="number of pairs")],
    steps: Steps = None,
    sampler: SamplerName = None,
    guidance: Guidance = None,
    guide_with: GuideWith = None,
    ema: Ema = None,
    sigma: Sigma = None,
    raw: Raw = False,
    prompts: Annotated[Path | None, typer.Option(help="a text file with a prompt a line, in turn")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of the noise")] = None,
    step: Step = None,
) -> None:
    """Draw pairs of noise and samples, for a flow that trains on them (diffusion.coupling data).

    Alone, or on every rank a launcher started; the shards have the same bytes at any number of ranks. Guidance is in
    the samples then: a run on pairs is sampled with guidance 1.
    """
    from dtrain import distributed
    from dtrain.run import RunDirectory

    directory = RunDirectory.find(run)
    chosen = {"steps": steps, "sampler": sampler, "guidance": guidance, "guide_with": guide_with, "ema": ema}
    settings = with_eval(directory.config(), chosen | {"sigma": sigma, "seed": seed}, raw)
    said = lines_of(prompts) if prompts else []
    ctrl_c.kept(f"shards that are whole are kept; go on with: {this_command()}")
    distributed.prepare()
    from dtrain.evaluation.pairs import draw_pairs

    with progress("drawing pairs, evaluations of the network") as on_progress:
        done = draw_pairs(directory, settings, n, step, destination, on_progress, said)
    if distributed.rank() == 0:
        say(printable(done))
    distributed.finalize()


def invert(
    run: RunName,
    pictures: Annotated[list[str], typer.Argument(metavar="PICTURES...", help="files, or folders of them")],
    steps: Annotated[int | None, typer.Option(min=1, help="in each direction")] = None,
    guidance: Annotated[float | None, typer.Option(help="1 alone: guided steps cannot be reversed")] = None,
    ema: Ema = None,
    raw: Raw = False,
    label: Annotated[int | None, typer.Option(min=0, help="the class of all pictures; default: no class")] = None,
    step: Step = None,
    out: Annotated[
        Path,
        typer.Option(
            help="the name of two files: .png, originals beside reconstructions, and .npz with `noise`, `images`, "
            "`reconstructions`, `labels`, `files`"
        ),
    ] = Path("inverted"),
) -> None:
    """Find the noise that a run's weights turn into given pictures, and draw them back from it.

    By deterministic DDIM, or Euler's method for a flow, backwards. Pictures are scaled and cropped as the run's
    held-out ones.
    """
    from dtrain import distributed
    from dtrain.run import RunDirectory

    if guidance not in (None, 1.0):
        raise UserError(f"--guidance {guidance:g}: pictures are inverted with guidance 1 alone; leave it out")
    directory = RunDirectory.find(run)
    own = directory.config()
    check_label(label, own.model.num_classes, directory.path)
    distributed.prepare()
    from dtrain.evaluation.invert import invert_to_files, settings_of_inversion
    from dtrain.evaluation.pictures import picture_files

    settings = with_eval(own, {"steps": steps, "ema": ema, **settings_of_inversion(own.diffusion)}, raw)
    files = picture_files(pictures)
    ctrl_c.at_once(lambda: f"nothing was written; start again with: {this_command()}")
    with progress("inverting, evaluations of the network") as on_progress:
        found, targets = invert_to_files(directory, settings, files, label, step, out, on_progress)
    if distributed.rank() == 0:
        for path, x_T, psnr in zip(files, found.noise, found.psnr, strict=True):
            noise = f"x_T mean {x_T.mean():.3f}, std {x_T.std():.3f}, max |x_T| {abs(x_T).max():.2f}"
            say(f"{printable(path)}: PSNR {psnr:.2f} dB, {noise}")
        every = (
            f"PSNR {found.psnr.min():.2f} to {found.psnr.max():.2f} dB, x_T std {found.noise.std():.3f} (pure noise: 1)"
        )
        say(f"{len(files)} pictures in {' and '.join(map(str, targets))}: {every}")
    distributed.finalize()
