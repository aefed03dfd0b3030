"""The losses of rows, as a step asks an objective for them."""

from dtrain.position import Position


def row_losses(objective, model, x0, noise, u, condition):
    """The loss (n,) of each row of a batch with these x_0, noise and draws of time."""
    batch = {"x_0": x0, "noise": noise, "time": u}
    return objective.losses("main", {"backbone": model}, batch, condition, Position()).rows
