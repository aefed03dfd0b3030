"""What the model says of held-out images: bits per dimension, and its loss at fixed noise levels."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch

from dtrain import distributed
from dtrain.batch import Condition
from dtrain.conditions.build import NOTHING, Said
from dtrain.diffusion import likelihood, variational_bound
from dtrain.diffusion.times import middles
from dtrain.diffusion.variational import VariationalDiffusion
from dtrain.evaluation.generate import Generator, OnProgress, encoded, quiet
from dtrain.evaluation.names import PARTS
from dtrain.objectives.objective import Objective
from dtrain.randomness import Draws, Purpose

BLOCK = 128  # held-out images at a time
DECODER = 2**33  # the number of its noise; those of times and of levels lie below


def rows_of_a_rank(n: int, size: int = BLOCK) -> list[range]:
    """This rank's share of n rows in blocks; dealt in turn, so that every rank count gives the same blocks."""
    starts = range(0, n, size)[distributed.rank() :: distributed.world_size()]
    return [range(start, min(start + size, n)) for start in starts]


def held_out(
    generator: Generator, images: torch.Tensor, labels: torch.Tensor, rows: range, said: Said
) -> tuple[torch.Tensor, Condition]:
    """(x_0, what the network is told) of these held-out images, on the generator's device."""
    pixels, own = images[rows.start : rows.stop].to(generator.device), labels[rows.start : rows.stop]
    own_words = {name: words[rows.start : rows.stop] for name, words in said.items()}
    return encoded(generator.first_stage, pixels, rows.start), generator.condition(list(rows), own, own_words)


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in rank order."""
    return torch.stack(distributed.gather_objects(values.cpu())).sum(0)


def bits_per_dim(
    generator: Generator,
    images: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
    clip: bool = False,
    on_progress: OnProgress = quiet,
    said: Said = NOTHING,
) -> dict[str, float]:
    """The bound on held-out images (M, C, H, W) in [−1, 1] with their labels (M,), every timestep with one noise each.

    `bpd` and its parts: `bpd_prior` L_T, `bpd_chain` Σ L_t, `bpd_decoder` L_0. Collective. Ho et al. 2020, equation 5.
    Of variational diffusion in continuous time, one time in each of `variational_bound.TIMES` equal parts of [0, 1].
    said: captions of each condition that has some, the first M of which are of these images.
    clip: of the chain whose every x̂_0 is held within [−1, 1], as guided-diffusion's figures are.
    """
    return _named("bpd", _bound(generator, images, labels, seed, clip, "bits", on_progress, said))


def nats_per_dim(
    generator: Generator,
    images: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
    on_progress: OnProgress = quiet,
    said: Said = NOTHING,
) -> dict[str, float]:
    """The bound on −log p of the latents of held-out images, normalised as the network sees them, by the density's last
    term: `nats_per_dim_latent` and its parts. Collective. It may be negative, and says nothing of pixels.
    """
    parts = _bound(generator, images, labels, seed, False, "nats", on_progress, said)
    return _named("nats_per_dim_latent", [part / likelihood.BITS for part in parts])


def _named(metric: str, parts: Sequence[float]) -> dict[str, float]:
    return {metric: sum(parts)} | {f"{metric}_{name}": part for name, part in zip(PARTS[metric], parts, strict=True)}


@torch.inference_mode()
def _bound(
    generator: Generator,
    images: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
    clip: bool,
    unit: str,
    on_progress: OnProgress,
    said: Said,
) -> list[float]:
    """L_T, Σ L_t and L_0 in bits per dimension; unit: as `on_progress` calls it."""
    generator.model.eval()
    process = generator.process
    total, evaluations = torch.zeros(3, dtype=torch.float64), itertools.count(1)
    variational = isinstance(process, VariationalDiffusion)
    a_block = variational_bound.evaluations(process) if variational else process.schedule.timesteps
    of = len(rows_of_a_rank(len(images))) * a_block

    def evaluated(x: torch.Tensor, t: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        answer = generator.model(x, t, **condition)
        on_progress(next(evaluations), of, f"{unit} per dimension of {len(images):,} images")
        return answer

    def add_up() -> None:
        for rows in rows_of_a_rank(len(images)):
            x0, condition = held_out(generator, images, labels, rows, said)
            noise = partial(generator.normals(seed, rows), Purpose.VALIDATION_NOISE)  # of timestep t
            asked = partial(evaluated, **condition), process, x0
            if variational:
                parts = variational_bound.sums(*asked, _with_decoder(noise), _within(seed, rows, x0.device), clip)
            else:
                parts = likelihood.sums(*asked, noise, clip)
            total.add_(parts.cpu())

    distributed.agree(add_up)  # one rank may give way to a stop
    return (summed(total) / len(images)).tolist()


def _with_decoder(noise: Callable[[int], torch.Tensor]) -> Callable[[int], torch.Tensor]:
    """Numbers of noise from −1 on, which is the decoder's."""
    return lambda i: noise(DECODER if i == -1 else i)


def _within(seed: int, rows: range, device: torch.device) -> torch.Tensor:
    """Where in equal parts of [0, 1] the times of these images lie, float64 (n,) in [0, 1)."""
    draws = Draws(seed)
    u = [draws.uniform(Purpose.VALIDATION_TIME, row) for row in rows]
    return torch.tensor(u, dtype=torch.float64).to(device)


@torch.inference_mode()
def losses_by_level(
    generator: Generator,
    objective: Objective,
    images: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
    said: Said = NOTHING,
) -> dict[str, float]:
    """loss_level_0 … loss_level_7: the training loss at the middle of each eighth of the process, one fixed noise each.

    images (M, C, H, W) in [−1, 1], labels (M,). said: as of `bits_per_dim`. Collective.
    """
    generator.model.eval()
    places = middles()
    total = torch.zeros(len(places), dtype=torch.float64)

    def add_up() -> None:
        for rows in rows_of_a_rank(len(images)):
            x0, condition = held_out(generator, images, labels, rows, said)
            normals = generator.normals(seed, rows)
            for level, place in enumerate(places):
                noise = normals(Purpose.VALIDATION_NOISE, 2**32 + level)
                at = torch.full((len(rows),), place, dtype=torch.float64, device=generator.device)
                total[level] += objective.losses_at(generator.model, x0, noise, at, condition).double().sum().cpu()

    distributed.agree(add_up)
    means = (summed(total) / len(images)).tolist()
    return {f"loss_level_{level}": value for level, value in enumerate(means)}
