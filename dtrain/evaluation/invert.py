"""`dtrain invert`: pictures to their noise x_T, and back again; `dtrain.load(…).invert` does the same.

Deterministic DDIM, or Euler's method for a flow, walks along the same times in both directions.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtrain import distributed
from dtrain.config import EDM, Config, Eval, Flow, Gaussian, Variational
from dtrain.data.fields.picture import normalize
from dtrain.diffusion.samplers import encode, network_evaluations, sample
from dtrain.errors import NotFinite, UserError
from dtrain.evaluation.generate import MOST_NAMED, Generator, OnProgress, quiet, which_not_finite
from dtrain.evaluation.grid import grid
from dtrain.evaluation.opened import open_generator
from dtrain.evaluation.pictures import read_pictures
from dtrain.evaluation.requirements import check_walks
from dtrain.files import replacing
from dtrain.run import RunDirectory

MOST_SHOWN = 64  # pictures in the grid; the arrays have all


@dataclass(frozen=True)
class Inversion:
    """N pictures, the noise they were inverted to, and what is drawn from that noise."""

    noise: np.ndarray  # x_T, float32 (N, C, H, W)
    images: np.ndarray  # the pictures as the model sees them, uint8 (N, H, W, C)
    reconstructions: np.ndarray  # uint8 (N, H, W, C)
    labels: np.ndarray  # int64 (N,) that the model was given; its number of classes is the null class

    @property
    def psnr(self) -> np.ndarray:
        """Peak signal-to-noise ratio of each round trip in dB, float64 (N,), peak 255; inf where nothing differs."""
        difference = self.images.astype(np.float64) - self.reconstructions
        with np.errstate(divide="ignore"):
            return 10 * np.log10(255**2 / np.square(difference).mean(axis=(1, 2, 3)))

    @classmethod
    def joined(cls, parts: Iterable["Inversion"]) -> "Inversion":
        """All of them, in this order."""
        arrays = zip(*((p.noise, p.images, p.reconstructions, p.labels) for p in parts), strict=True)
        return cls(*map(np.concatenate, arrays))


def settings_of_inversion(diffusion: Gaussian | Flow | EDM | Variational) -> dict:
    """The `eval` keys that an inversion decides itself: the walk that can be reversed, and no guidance.

    Raises UserError for gamma noise and for a denoising GAN.
    """
    if getattr(diffusion, "noise", "normal") == "gamma":
        raise UserError(
            "a run with diffusion.noise gamma inverts no pictures: what is walked backwards is the ODE of normal noise"
        )
    if diffusion.process == "ddgan":
        raise UserError("a run with diffusion.process ddgan inverts no pictures: each of its steps draws anew")
    euler = diffusion.process in ("flow", "meanflow")
    without_noise = {"eta": 0.0, "churn": 0.0, "churn_min": 0.0, "churn_max": 0.0, "churn_noise": 1.0}
    return {"sampler": "euler" if euler else "ddim", **without_noise, "clip": False, "guidance": 1.0}


def without_class(n: int, num_classes: int, label_dropout: float) -> Tensor:
    """Labels int64 (n,) of pictures without a given class: the null class. Raises UserError if it is untrained."""
    if num_classes and label_dropout == 0:
        raise UserError(
            "this model always needs a class, because diffusion.label_dropout 0 trains it on nothing else; give the "
            "class of the pictures with --label, or `labels` in Python"
        )
    return torch.full((n,), num_classes)


@torch.inference_mode()
def invert(
    generator: Generator, images: Tensor, labels: Tensor, how: Eval, names: list[str], on_evaluation=lambda: None
) -> Inversion:
    """One block of pictures, uint8 (n, C, H, W) with labels int64 (n,), to noise and back.

    how: with `settings_of_inversion`. on_evaluation: called each time that the model has answered. Raises NotFinite,
    with the pictures' names, where the noise, or what is drawn from it, is not.
    """
    denoiser = generator.denoiser(generator.condition(list(range(len(labels))), labels), how, on_evaluation)
    timesteps = generator.process.walk(how.steps, how.spacing)
    x_0 = generator.first_stage.encode(normalize(images).to(generator.device))
    noise = encode(denoiser, generator.process, x_0, timesteps)
    x_0 = sample(denoiser, generator.process, noise, how.sampler, how.steps, how.spacing)
    if bad := which_not_finite(torch.cat([noise, x_0], dim=1)):
        named = ", ".join([names[row] for row in bad[:MOST_NAMED]] + ["…"] * (len(bad) > MOST_NAMED))
        raise NotFinite(
            f"the inversion is not finite for {len(bad)} of {len(names)} pictures ({named}): the weights have "
            "diverged, or precision overflows; take an earlier checkpoint or other settings"
        )
    pixels, redrawn = (
        i.cpu().permute(0, 2, 3, 1).contiguous().numpy() for i in (images, generator.first_stage.decode(x_0))
    )
    return Inversion(noise.cpu().numpy(), pixels, redrawn, labels.cpu().numpy())


def invert_blocks(
    generator: Generator,
    blocks: dict[int, Tensor],
    labels: Tensor,
    how: Eval,
    names: list[str],
    on_progress: OnProgress = quiet,
) -> dict[int, Inversion]:
    """`invert` of this rank's blocks (n, C, H, W), by the number of their first picture among all.

    labels int64 (N,) and names are of all pictures.
    """
    done, evaluations = {}, itertools.count(1)
    of = 2 * len(blocks) * network_evaluations(generator.process, how.sampler, how.steps, how.spacing)
    for start, images in blocks.items():
        rows = slice(start, start + len(images))
        count = lambda: on_progress(next(evaluations), of)  # noqa: E731
        done[start] = invert(generator, images, labels[rows], how, names[rows], count)
    return done


def places(out: Path, pictures: list[Path]) -> tuple[Path, Path]:
    """(the grid, the arrays): `out`.png and `out`.npz. Raises UserError where they would overwrite a picture."""
    stem = out.with_suffix("") if out.suffix in (".png", ".npz") else out
    if not stem.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {stem.absolute().parent}")
    found = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.npz")
    taken = {path.resolve() for path in pictures}
    for path in found:
        if path.resolve() in taken:
            raise UserError(f"--out {out} would overwrite {path}, one of the pictures to invert; name another")
        if path.is_dir():
            raise UserError(f"--out {out}: {path} is a folder; name another")
    return found


def invert_to_files(
    run: RunDirectory,
    config: Config,
    pictures: list[Path],
    label: int | None,
    step: int | None,
    out: Path,
    on_progress: OnProgress,
) -> tuple[Inversion, tuple[Path, Path]]:
    """Invert all pictures, in blocks dealt to ranks; rank 0 writes the grid and the arrays of `places`. A collective.

    config: the run's with `settings_of_inversion`. label: of all pictures; None for no class. Raises UserError.
    """
    check_walks(config, run.path)
    targets, how, n = places(out, pictures), config.eval, len(pictures)
    if label is None:
        labels = without_class(n, config.model.num_classes, config.diffusion.label_dropout)
    else:
        labels = torch.full((n,), label)
    distributed.initialize()

    def read() -> dict[int, Tensor]:
        starts = range(0, n, how.batch_size)[distributed.rank() :: distributed.world_size()]
        return {start: read_pictures(pictures[start : start + how.batch_size], config.data) for start in starts}

    blocks = distributed.agree(read)  # all of them first: a picture that cannot be read costs no computation
    generator = open_generator(run, config, distributed.device(), step).generator
    names = list(map(str, pictures))
    mine = distributed.agree(invert_blocks, generator, blocks, labels, how, names, on_progress)
    done = {start: block for part in distributed.gather_objects(mine) for start, block in part.items()}
    found = Inversion.joined(done[start] for start in sorted(done))
    distributed.on_rank_0(_write, found, names, targets, max(1, 32 // config.data.image_size))
    return found, targets


def _write(found: Inversion, names: list[str], targets: tuple[Path, Path], scale: int) -> None:
    """The pairs original | reconstruction, and all arrays. Raises UserError."""
    pairs = _pairs(found.images[:MOST_SHOWN], found.reconstructions[:MOST_SHOWN])
    columns = int(np.ceil(np.sqrt(len(pairs) / 2)))  # about as wide as high
    picture, arrays = targets
    path = picture
    try:
        with replacing(picture) as f:
            grid(torch.from_numpy(pairs).permute(0, 3, 1, 2), columns, scale).save(f, "png")
        path = arrays
        with replacing(arrays) as f:
            np.savez(
                f,
                noise=found.noise,
                images=found.images,
                reconstructions=found.reconstructions,
                labels=found.labels,
                files=np.array(names),
            )
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; name a writable place with --out") from None


def _pairs(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Each original beside its reconstruction, with grey margins left and right: uint8 (n, H, W′, C)."""
    n, height, width, channels = images.shape
    line = np.full((n, height, 1, channels), 24, np.uint8)  # as `grid` draws them
    margin = np.full((n, height, max(1, width // 8), channels), 128, np.uint8)
    return np.concatenate([margin, images, line, reconstructions, margin], axis=2)
