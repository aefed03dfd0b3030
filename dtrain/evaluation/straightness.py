"""The straightness of a flow's paths from the noise of its first samples."""

from collections.abc import Callable

import torch
from torch import Tensor

from dtrain import distributed
from dtrain.conditions.build import Said
from dtrain.config import Eval
from dtrain.diffusion.straightness import straightness
from dtrain.evaluation.generate import Generator, OnProgress, quiet
from dtrain.evaluation.likelihood import rows_of_a_rank, summed
from dtrain.randomness import Purpose

STEPS = 100  # of the walk, whatever eval.steps is


@torch.inference_mode()
def measured(
    generator: Generator,
    n: int,
    asked: Callable[[list[int]], tuple[Tensor, Said]],
    how: Eval,
    on_progress: OnProgress = quiet,
) -> dict[str, float]:
    """Its mean over samples 0 … n − 1. asked: labels and captions of ids. A collective."""
    total, blocks = torch.zeros(1, dtype=torch.float64), rows_of_a_rank(n, how.batch_size)

    def add_up() -> None:
        for done, ids in enumerate(map(list, blocks)):
            labels, said = asked(ids)
            denoiser = generator.denoiser(generator.condition(ids, labels, said), how)
            x_T = generator.normals(how.seed, ids)(Purpose.SAMPLE_NOISE)
            total.add_(straightness(denoiser, generator.process, x_T, STEPS).sum().cpu())
            on_progress(done + 1, len(blocks), "the straightness of paths")

    distributed.agree(add_up)
    return {"straightness": float(summed(total)) / n}
