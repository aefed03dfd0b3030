"""The density that a flow gives held-out images, by its ODE: bits per dimension of pixels, nats of latents."""

import math

import torch
from torch import Tensor

from dtrain import distributed
from dtrain.conditions.build import NOTHING, Said
from dtrain.config import Eval
from dtrain.diffusion.likelihood import BITS, HALF_BIN
from dtrain.diffusion.ode_likelihood import log_density
from dtrain.errors import NotFinite
from dtrain.evaluation.generate import Generator, OnProgress, quiet
from dtrain.evaluation.likelihood import held_out, rows_of_a_rank, summed
from dtrain.evaluation.names import PARTS
from dtrain.randomness import Purpose

LEVEL = 2 * HALF_BIN  # between neighbouring values of an 8-bit channel mapped to [−1, 1]


def dequantised(x0: Tensor, normals: Tensor) -> Tensor:
    """Pixels spread evenly over the bin of their level: −log of this density bounds that of the levels from above.

    Theis et al. 2016, section 3.1. normals: standard normals, shaped as x0, whose ranks are the places in the bins.
    """
    return x0 + LEVEL * (torch.special.ndtr(normals.double()).to(x0.dtype) - 0.5)


def measured(
    metric: str,
    generator: Generator,
    images: Tensor,
    labels: Tensor,
    how: Eval,
    on_progress: OnProgress = quiet,
    said: Said = NOTHING,
) -> dict[str, float]:
    """bpd_ode or nats_per_dim_latent_ode of held-out images (M, C, H, W) in [−1, 1], labels (M,), and its parts.

    The first is −log2 p of dequantised pixels per dimension, in units of their 256 levels; the second −log p of the
    latents as the network sees them. prior: of the noise that the image leads to; volume: of how the walk there
    spreads. Blocks of eval.batch_size, dealt to ranks. A collective; raises NotFinite where a walk cannot go on.
    said: captions of each condition that has some, the first M of which are of these images.
    """
    generator.model.eval()
    process = generator.process
    total, blocks = torch.zeros(2, dtype=torch.float64), rows_of_a_rank(len(images), how.batch_size)

    def add_up() -> None:
        for done, rows in enumerate(blocks):
            with torch.inference_mode():
                x0, condition = held_out(generator, images, labels, rows, said)
                normals = generator.normals(how.seed, rows)
                if metric == "bpd_ode":
                    x0 = dequantised(x0, normals(Purpose.DEQUANTISATION))
                drawn = [normals(Purpose.TRACE_PROBE, number) for number in range(how.ode_probes)]
            # Copies, since no gradient may flow through what inference mode has made.
            x0, probes = x0.clone(), [torch.where(one < 0, -1.0, 1.0) for one in drawn]
            condition = {name: value.clone() for name, value in condition.items()}

            def denoiser(x: Tensor, t: Tensor, condition=condition) -> Tensor:
                return generator.model(x, t, **condition)

            def show(t: float, done: int = done) -> None:
                share = round(1000 * (done + t))
                on_progress(share, 1000 * len(blocks), f"the density of {len(images):,} images by the ODE")

            try:
                found = log_density(denoiser, process, x0, probes, how.ode_tolerance, show)
            except ValueError as e:
                raise NotFinite(f"{metric} of held-out images {rows.start} to {rows.stop - 1}: {e}") from None
            total.add_(torch.stack([found.prior.sum(), found.volume.sum()]).cpu())

    distributed.agree(add_up)
    nats = -summed(total) / len(images) / math.prod(generator.shape)
    parts = (nats if metric != "bpd_ode" else nats * BITS).tolist()
    levels = -math.log2(LEVEL) if metric == "bpd_ode" else 0.0  # from a density to the probability of a level
    names = [f"{metric}_{part}" for part in PARTS[metric]]
    return {metric: sum(parts) + levels} | dict(zip(names, parts, strict=True))
