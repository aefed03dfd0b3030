"""Weights out of a checkpoint into a plain module, on one process, without DeepSpeed."""

import torch

from dtrain.checkpoint.format import Checkpoint


@torch.no_grad()
def load_weights(checkpoint: Checkpoint, module: torch.nn.Module, key: str) -> torch.nn.Module:
    """Fill a module with a checkpoint's "fp32" weights or one of its EMAs ("ema_0"); frozen parameters have only fp32.

    Raises Damaged, or KeyError when the checkpoint holds no such tensor.
    """
    for name, p in module.named_parameters():
        values = checkpoint.tensor(f"{name}:{key if p.requires_grad else 'fp32'}")
        p.copy_(torch.from_numpy(values).view(p.shape))
    return module
