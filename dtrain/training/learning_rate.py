"""The learning rate of a step."""

from dtrain.config import Optim


def learning_rate(optim: Optim, step: int) -> float:
    """The learning rate of step 1, 2, …: linear warm-up, then constant."""
    return optim.lr * min(1.0, step / max(1, optim.warmup_steps))
