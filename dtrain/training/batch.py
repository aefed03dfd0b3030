"""The learning rate of a step."""

from dtrain.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step 1, 2, …: linear warm-up, then constant."""
    return config.optim.lr * min(1.0, step / max(1, config.optim.warmup_steps))
