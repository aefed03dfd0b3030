"""Guidance: away from the model's own answer without a class (Ho & Salimans 2022), or from a weaker model's."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dtrain.batch import Condition
from dtrain.config.guidance import chain
from dtrain.diffusion.prediction import Apart
from dtrain.diffusion.projection import Projection
from dtrain.diffusion.tables import known
from dtrain.errors import UserError

Model = Callable[..., Tensor]  # (x (N, C, H, W), t (N,), **condition) → (N, O, H, W)


def guided(
    model: Model,
    guidance: float | str,
    null: Callable[..., Condition] | None,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    last_time: float = 1000,
    rescale: float = 0.0,
    project: Projection | None = None,
    weak: Model | None = None,
    renoise: str = "guided",
) -> Model:
    """A model(x, t, **condition) that returns uncond + s·(cond − uncond), s = `guidance`, both in one batch of 2N.

    null: null(condition) is what the rows of a condition are told where nothing is said, null(condition, told=NAMES)
    where these conditions alone are told; None for a model that is told nothing. s = 1 is the model itself, so its
    outputs are the same bit for bit; the papers' w is s − 1.

    guidance: also a text such as `text=3,label=1.5`, of each condition c_1, c_2, … apart, all in one batch (Brooks et
    al. 2023, equation 3): ε(nothing) + Σ s_i (ε(c_1 … c_i) − ε(c_1 … c_(i−1))). `config.guidance.chain` says which of
    these answers are needed.

    channels: how many of the image's channels, counted from the first, are guided; all by default. 3 repeats published
    DiT results on 4-channel latents. All other channels of the output are the conditional ones: a learned variance,
    which follows the image's own channels, is an interpolation and is never extrapolated.
    interval: the shares of the process (0 is clean data) in which to guide; t/last_time must lie in [low, high).
    Outside it the conditional model answers alone, at half the cost (Kynkäänniemi et al. 2024).
    project: what becomes of each difference before it is scaled; None: nothing.
    rescale: how far, from 0 to 1, each row's guided channels go back to the conditional ones' standard deviation (Lin
    et al. 2023, section 3.4).
    weak: another model, asked in the place of the null: weak + s·(model − weak), both told everything (Karras et al.
    2024, autoguidance). guidance is one number then.
    renoise: away gives `Apart` answers, whose noise is that of the answer led away from (Chung et al. 2024, CFG++).

    Raises UserError for s ≠ 1 on a model without conditions, unless there is a weak one.
    """
    begun, steps = chain(guidance)
    if not steps:
        return model
    if null is None and weak is None:
        raise UserError(f"guidance {guidance} needs a model with classes, but model.num_classes is 0; use guidance 1")

    asked = [*(names for _, names in reversed(steps[:-1])), begun]  # beside everything, from the most told on

    def answers_of(x: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """From the one led away from to the one that is told everything."""
        if weak is not None:
            return [weak(x, t, **condition), model(x, t, **condition)]
        less = [null(condition, told=names) if names else null(condition) for names in asked]
        told = {name: torch.cat([value, *(one[name] for one in less)]) for name, value in condition.items()}  # (MN, …)
        m = 1 + len(less)
        return list(reversed(model(torch.cat([x] * m), torch.cat([t] * m), **told).chunk(m)))  # (N, O, H, W) each

    def mixture(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor | Apart:
        inside = _within(t, interval, last_time)
        if not (inside if isinstance(inside, bool) else bool(inside.any())):
            return model(x, t, **condition)
        n = x.shape[1] if channels is None else min(channels, x.shape[1])
        whole = answers_of(x, t, condition)
        answers, cond = [one[:, :n] for one in whole], whole[-1]
        away, towards, rest = answers[0], answers[-1], cond[:, n:]
        mixed = away
        for number, ((scale, _), (before, after)) in enumerate(zip(steps, pairwise(answers), strict=True)):
            difference = after - before
            if project is None:
                mixed = mixed + scale * difference
            else:  # s = 1 leads to `after` whatever is projected
                kept = project(number, difference, after, x[:, :n], t)
                mixed = mixed + scale * kept + (difference - kept)
        if rescale:
            contrast = _std(towards) / _std(mixed)
            mixed = mixed * (rescale * contrast + (1 - rescale))

        def completed(answer: Tensor) -> Tensor:
            if rest.shape[1]:
                answer = torch.cat([answer, rest], dim=1)
            return answer if inside is True else torch.where(inside.view(-1, 1, 1, 1), answer, cond)

        return completed(mixed) if renoise == "guided" else Apart(completed(mixed), completed(away))

    return mixture


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
