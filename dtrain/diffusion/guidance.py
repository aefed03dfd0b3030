"""Classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Callable

import torch
from torch import Tensor

from dtrain.errors import UserError

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def guided(model: Model, guidance: float, null_label: int) -> Model:
    """A model(x, t, labels) that returns uncond + s·(cond − uncond), s = `guidance`, both in one batch of 2N.

    null_label is the model's class count. s = 1 is the model itself, so its outputs are the same bit for bit; the
    papers' w is s − 1. All channels are guided. Raises UserError for s ≠ 1 on a model without classes.
    """
    if guidance == 1:
        return model
    if null_label == 0:
        raise UserError(f"guidance {guidance} needs a model with classes, but model.num_classes is 0; use guidance 1")

    def both(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        labels = torch.cat([labels, torch.full_like(labels, null_label)])  # (2N,)
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)  # (N, C, H, W) each
        return uncond + guidance * (cond - uncond)

    return both
