"""What may be wrong with a batch's x_0, looked at where there is a reason to: a first stage may give no numbers for a
picture, or numbers of another scale. A healthy step pays nothing for this.
"""

import numpy as np
import torch

from dtrain.batch import Batch, split
from dtrain.config import Config
from dtrain.data.order.names import SampleNames
from dtrain.errors import BadSample
from dtrain.first_stage.pixels import FirstStage, Pixels, x_0_of
from dtrain.first_stage.requirements import about_scale

NAMED = 4  # samples in a message


def not_finite(first_stage: FirstStage, batch: Batch, micro_batch: int, names: SampleNames) -> BadSample | None:
    """After a step that was refused: an error that names the pictures whose x_0 is not finite; None where all are."""
    if isinstance(first_stage, Pixels):
        return None
    bad = ~_x_0(first_stage, batch, micro_batch).flatten(1).isfinite().all(1)
    if not bad.any():
        return None
    k = batch["k"][bad].cpu().numpy().astype(np.int64)
    named = ", ".join([*names.of(k[:NAMED]), *(["…"] if len(k) > NAMED else [])])
    return BadSample(
        f"the first stage gives no finite latent for {len(k)} of the pictures of a step ({named}); take "
        "first_stage.precision fp32, or pack the shards without them"
    )


def about_first(first_stage: FirstStage, config: Config, batch: Batch, micro_batch: int) -> list[str]:
    """After the first step of first_stage kl: lines about the scale of this rank's latents, where no statistics are
    known of them.
    """
    section = config.first_stage
    if section.cached or section.normalise != "published":
        return []
    return about_scale(section, float(_x_0(first_stage, batch, micro_batch).square().mean().sqrt()))


def _x_0(first_stage: FirstStage, batch: Batch, micro_batch: int) -> torch.Tensor:
    return torch.cat([x_0_of(first_stage, part) for part in split(batch, micro_batch)])
