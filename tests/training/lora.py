"""Trainings of low-rank adapters on a base, a path."""

from tests.digits import tiny

OWN = (
    *("train.steps=6", "train.checkpoint_every=3", "eval.every=6", "ema.0.decay=0.5", "optim.lr=5e-2"),
    *("eval.num_samples=24", "eval.steps=3", "eval.validation_images=24"),
)


def adapted(digits, folder, base, *overrides):
    return tiny(digits, folder, *OWN, f"model.adapt={{of: {base}, rank: 4, alpha: 8}}", *overrides)
