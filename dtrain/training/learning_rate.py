"""The learning rate of a step."""

import math

from dtrain.config import Optim
from dtrain.position import Position


def learning_rate(optim: Optim, at: Position) -> float:
    """The learning rate of the step that begins at this position.

    Linear warm-up by steps, times the schedule by images seen before the step: runs of any batch size have the same
    rate at the same images, and a resumed one goes on where it was.
    """
    return optim.lr * min(1.0, (at.step + 1) / max(1, optim.warmup_steps)) * factor(optim, at.images)


def factor(optim: Optim, images: int) -> float:
    """What the schedule makes of `optim.lr` after so many images; 1 before `decay_start`, 0 from `decay_end` on.

    inverse_sqrt: Karras et al. 2024 (EDM2): 1 / sqrt(max(t / t_ref, 1)), t_ref being `decay_start`.
    trapezoid: Hägele et al. 2024, constant with a linear cool-down.
    """
    if optim.schedule == "constant":
        return 1.0
    start = optim.decay_start or 0
    if optim.schedule == "inverse_sqrt":
        return 1 / math.sqrt(max(images / start, 1.0))
    end = optim.decay_end
    length = end * optim.decay_share if optim.schedule == "trapezoid" else end - start
    left = min(max((end - images) / length, 0.0), 1.0)
    return (1 - math.cos(math.pi * left)) / 2 if optim.schedule == "cosine" else left
