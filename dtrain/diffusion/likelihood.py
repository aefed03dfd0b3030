"""The variational bound term by term, in bits per dimension (Ho et al. 2020, equation 5).

    −log p(x_0) ≤ L_T + Σ_{t ≥ 1} L_t + L_0,  with  L_T = KL(q(x_T|x_0) ‖ N(0, I)),
    L_t = KL(q(x_{t−1}|x_t, x_0) ‖ p(x_{t−1}|x_t))  and  L_0 = −log p(x_0|x_0 with one step of noise).

Everything is a pure function of a batch: what to average over rows, ranks and draws of noise is the caller's.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dtrain.diffusion.gaussian import GaussianDiffusion

BITS = 1 / math.log(2)
HALF_BIN = 1 / 255  # of an 8-bit channel mapped to [−1, 1]


def prior(process: GaussianDiffusion, x0: Tensor) -> Tensor:
    """L_T of each row (N,) of x0 (N, C, H, W), bits/dim. No network: it is what the schedule leaves of the data."""
    alpha_bar = float(process.schedule.alpha_bar[-1])
    kl = 0.5 * (alpha_bar * x0.square() - alpha_bar - math.log1p(-alpha_bar))
    return BITS * kl.flatten(1).mean(1)


def term(process: GaussianDiffusion, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip: bool = False) -> Tensor:
    """L_t of each row (N,), bits/dim, from the model's output (N, C or 2C, H, W) at x_t; L_0 where t is 0.

    clip holds x̂_0 within [−1, 1], where pixels live. L_0 is the discretised decoder, or the density of a Gaussian where
    process.decoder is "continuous": then the bound is one on a density and may be negative.
    """
    x0_hat = process.x0(output, x_t, t)
    if clip:
        x0_hat = x0_hat.clamp(-1, 1)
    log_variance = process.log_variance(output, x_t, t)
    # Both means hold the same share of x_t, which would only cancel.
    difference = process.table(process.chain.mean_x0, t, x0) * (x0 - x0_hat)
    log_posterior = process.table(process.log_beta_tilde, t, x0)
    ratio = log_posterior - log_variance
    kl = 0.5 * (ratio.expm1() - ratio + difference.square() * (-log_variance).exp())
    is_decoder = (t == 0).view(-1, *[1] * (x0.dim() - 1))
    if process.decoder == "continuous":
        decoder = 0.5 * (math.log(2 * math.pi) + log_variance + difference.square() * (-log_variance).exp())
    else:
        # Of other rows x̂_0 may be so far off that both ends of a bin are one float: an infinite derivative, which
        # `where` would multiply by 0.
        mean, spread = torch.where(is_decoder, x0_hat, x0), torch.where(is_decoder, log_variance, 0.0)
        decoder = -log_mass(x0, mean, spread)
    return BITS * torch.where(is_decoder, decoder, kl).flatten(1).mean(1)


def log_mass(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The log of a Gaussian's mass in the bin of each 8-bit channel: x ± 1/255, open-ended at −1 and 1. Nats.

    Far bins are computed in their own tail, so that no floor is needed where a difference of two CDFs would vanish. Of
    bins that are thin beside the deviation (a hundredth in float32) it would be mostly rounding: there the mass is the
    integral of φ(z) e^(−zu) over the bin's u, which leaves e^(−u²/2) out, a relative 4e-6.
    """
    inverse_std = (-0.5 * log_variance).exp()
    lower, upper = (x0 - HALF_BIN - mean) * inverse_std, (x0 + HALF_BIN - mean) * inverse_std
    thin = 2 * HALF_BIN * inverse_std < 2 * torch.finfo(inverse_std.dtype).eps ** (1 / 3)
    left, right = torch.where(thin, -1.0, lower), torch.where(thin, 1.0, upper)  # no gradient from what is not taken
    mirrored = left + right > 0
    low, high = torch.where(mirrored, -right, left), torch.where(mirrored, -left, right)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    inside = log_high + torch.log(-torch.expm1(log_low - log_high))
    z = torch.where(thin, (x0 - mean) * inverse_std, 0.0)
    log_density = -0.5 * (z.square() + math.log(2 * math.pi))
    width = math.log(2 * HALF_BIN) - 0.5 * log_variance
    inside = torch.where(thin, log_density + width + _log_sinhc(z * HALF_BIN * inverse_std), inside)
    darkest, brightest = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    edge = 1 - HALF_BIN / 2
    return torch.where(x0 < -edge, darkest, torch.where(x0 > edge, brightest, inside))


def _log_sinhc(a: Tensor) -> Tensor:
    """log(sinh(a)/a): a series near 0, where the form for large ones would divide 0 by 0."""
    near = a.abs() < 0.5
    small, large = torch.where(near, a, 0.0).square(), torch.where(near, 1.0, a.abs())
    series = small * (1 / 6 - small * (1 / 180 - small / 2835))
    return torch.where(near, series, large + torch.log(-torch.expm1(-2 * large) / (2 * large)))


@torch.no_grad()
def curve(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    process: GaussianDiffusion,
    x0: Tensor,
    noise: Callable[[int], Tensor],
    timesteps: Iterable[int] | None = None,
    clip: bool = False,
) -> Tensor:
    """L_t of each row at each of `timesteps` (all T by default): (len(timesteps), N), bits/dim.

    noise(t) gives the standard normals of that timestep, shaped as x0. The bound of a row is `prior` plus the sum over
    all T; from a uniform subset, T times the mean estimates that sum without bias.
    """
    every = range(process.schedule.timesteps) if timesteps is None else timesteps
    rows = []
    for timestep in every:
        t = torch.full((len(x0),), timestep, device=x0.device)
        x_t = process.noised(x0, noise(timestep), t)
        rows.append(term(process, denoiser(x_t, t), x0, x_t, t, clip))
    return torch.stack(rows)


@torch.no_grad()
def sums(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    process: GaussianDiffusion,
    x0: Tensor,
    noise: Callable[[int], Tensor],
    clip: bool = False,
) -> Tensor:
    """The parts of the bound, prior, chain and decoder, summed over the rows of x0: float64 (3,).

    noise: as of `curve`.
    """
    terms = curve(denoiser, process, x0, noise, clip=clip).double()  # (T, N)
    return torch.stack([prior(process, x0).double().sum(), terms[1:].sum(), terms[0].sum()])
