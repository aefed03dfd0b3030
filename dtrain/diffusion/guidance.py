"""Classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Callable

import torch
from torch import Tensor

from dtrain.batch import Condition
from dtrain.diffusion.tables import known
from dtrain.errors import UserError

Model = Callable[..., Tensor]  # (x (N, C, H, W), t (N,), **condition) → (N, O, H, W)


def guided(
    model: Model,
    guidance: float,
    null: Callable[[Condition], Condition] | None,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    last_time: float = 1000,
    rescale: float = 0.0,
) -> Model:
    """A model(x, t, **condition) that returns uncond + s·(cond − uncond), s = `guidance`, both in one batch of 2N.

    null: what the rows of a condition are told where nothing is said; None for a model that is told nothing. s = 1 is
    the model itself, so its outputs are the same bit for bit; the papers' w is s − 1.

    channels: how many of the image's channels, counted from the first, are guided; all by default. 3 repeats published
    DiT results on 4-channel latents. All other channels of the output are the conditional ones: a learned variance,
    which follows the image's own channels, is an interpolation and is never extrapolated.
    interval: the shares of the process (0 is clean data) in which to guide; t/last_time must lie in [low, high).
    Outside it the conditional model answers alone, at half the cost (Kynkäänniemi et al. 2024).
    rescale: how far, from 0 to 1, each row's guided channels go back to the conditional ones' standard deviation (Lin
    et al. 2023, section 3.4).

    Raises UserError for s ≠ 1 on a model without conditions.
    """
    if guidance == 1:
        return model
    if null is None:
        raise UserError(f"guidance {guidance} needs a model with classes, but model.num_classes is 0; use guidance 1")

    def both(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        inside = _within(t, interval, last_time)
        if not (inside if isinstance(inside, bool) else bool(inside.any())):
            return model(x, t, **condition)
        nothing = null(condition)
        told = {name: torch.cat([value, nothing[name]]) for name, value in condition.items()}  # (2N, …)
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), **told).chunk(2)  # (N, O, H, W) each
        n = x.shape[1] if channels is None else min(channels, x.shape[1])
        towards, away, rest = cond[:, :n], uncond[:, :n], cond[:, n:]
        mixed = away + guidance * (towards - away)
        if rescale:
            contrast = _std(towards) / _std(mixed)
            mixed = mixed * (rescale * contrast + (1 - rescale))
        if rest.shape[1]:
            mixed = torch.cat([mixed, rest], dim=1)
        return mixed if inside is True else torch.where(inside.view(-1, 1, 1, 1), mixed, cond)

    return both


def _within(t: Tensor, interval: tuple[float, float], last_time: float) -> Tensor | bool:
    """Which rows are to be guided; one answer for all where the host knows that they have one time."""
    low, high = interval
    if (low, high) == (0.0, 1.0):
        return True
    if (time := known(t)) is not None:
        share = time / last_time
        return share >= low and (share < high or high >= 1)
    share = t.double() / last_time
    return (share >= low) & ((share < high) | (high >= 1))


def _std(x: Tensor) -> Tensor:
    """The standard deviation of each row, (N, 1, 1, 1)."""
    return x.flatten(1).std(1).view(-1, 1, 1, 1)
