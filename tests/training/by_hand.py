"""A step of one network in plain PyTorch, as the trainer takes it: for trainings written out again."""

import torch
from torch import nn


def move(network: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float, clip: float = 1.0):
    """Clip the gradient of the loss and step at this learning rate."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
