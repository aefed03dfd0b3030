"""The exact density of a flow by its ODE: Hutchinson's trace along an adaptive Runge–Kutta walk.

    dx/dt = v(x, t),   log p(x_0) = log N(x_1; 0, I) + ∫_0^1 div v(x_t, t) dt
(Chen et al. 2018, FFJORD: Grathwohl et al. 2019; Song et al. 2021, appendix D.2.) div v = E_e[e · ∂(v · e)/∂x] over
random signs e, which stay the same along the walk: each row's integral is without bias.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.solvers import Denoiser

# Dormand & Prince 1980: places, weights of the stages before each, and the fifth order less the embedded fourth.
_PLACES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_FIRST, _LEAST = 0.01, 1e-6  # steps of time
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 5.0


class Density(NamedTuple):
    """log p(x_0) = prior + volume of each row, nats, float64 (N,). evaluations: of the network, with its gradient."""

    prior: Tensor
    volume: Tensor
    evaluations: int


def velocity_and_divergence(
    denoiser: Denoiser, process: RectifiedFlow, x: Tensor, t: float, probes: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(v as x (N, …), the mean of the probes' estimates of div v, float64 (N,))."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        output = denoiser(x, process.model_time(t, x))
        velocity = process.eps(output, x, t) - process.x0(output, x, t)
        found = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for number, probe in enumerate(probes):
            last = number + 1 == len(probes)
            (pulled,) = torch.autograd.grad((velocity * probe).sum(), x, retain_graph=not last)
            found += (pulled * probe).flatten(1).sum(1).double()
    return velocity.detach(), found / len(probes)


def log_density(
    denoiser: Denoiser,
    process: RectifiedFlow,
    x0: Tensor,
    probes: Sequence[Tensor],
    tolerance: float = 1e-5,
    on_evaluation: Callable[[float], None] = lambda t: None,
) -> Density:
    """log p of each row of x0 (N, …), which the walk holds in float64 whatever the network computes in.

    probes: random signs, shaped as x0. tolerance: how far a step may be off, relative to 1 + |x| and absolute in
    log p per dimension, in the worst row; rows walk together, so a row's answer depends on its block within it.
    on_evaluation: called with the time. Raises ValueError where a step would have to be shorter than 1e-6.
    """
    dtype, dimensions = x0.dtype, x0[0].numel()
    signs, evaluations = [probe.to(dtype) for probe in probes], 0

    def slope(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        on_evaluation(t)
        velocity, divergence = velocity_and_divergence(denoiser, process, x.to(dtype), t, signs)
        return velocity.double(), divergence

    x, volume, t, step = x0.double(), x0.new_zeros(len(x0), dtype=torch.float64), 0.0, _FIRST
    first = slope(x, t)
    while t < 1:
        step = min(step, 1 - t)
        slopes = [first]
        for place, weights in zip(_PLACES[1:], _STAGES[1:], strict=True):
            ahead = x + step * _weighted(weights, [s[0] for s in slopes])
            slopes.append(slope(ahead, t + place * step))
        off_x, off_volume = (step * _weighted(_ERROR, list(part)) for part in zip(*slopes, strict=True))
        scale = 1 + torch.maximum(x.abs(), ahead.abs())
        of_x = (off_x / scale).flatten(1).square().mean(1).sqrt().max()
        error = max(float(of_x), float(off_volume.abs().max()) / dimensions) / tolerance
        if error <= 1:
            volume = volume + step * _weighted(_STAGES[-1], [s[1] for s in slopes[:-1]])
            x, t, first = ahead, t + step, slopes[-1]  # the last stage is the next step's first
            t = 1.0 if 1 - t < 1e-12 else t
        elif not math.isfinite(error) or step <= _LEAST:
            raise ValueError(f"the walk cannot go on at t = {t:.6f}: its error is {error:.3g} times the tolerance")
        step *= min(_GROW, max(_SHRINK, _SAFETY * max(error, 1e-10) ** -0.2))
    prior = -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return Density(prior, volume, evaluations)


def _weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    return sum(w * value for w, value in zip(weights, values, strict=True) if w)
