"""The bound of variational diffusion, in bits per dimension (Kingma et al. 2021, equations 11 to 17).

    −log p(x) ≤ KL(q(x_1|x) ‖ N(0, I)) + E[−log p(x|x at t = 0)] + ½ E_t w(t) ‖ε − ε̂‖²

w is γ'(t) in continuous time and T (e^(γ(t) − γ(t − 1/T)) − 1) for a chain of T steps, whose bound falls to the other.
Everything is a pure function of a batch: what to average over rows, ranks and draws of noise is the caller's.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dtrain.diffusion.likelihood import BITS, HALF_BIN
from dtrain.diffusion.variational import VariationalDiffusion

TIMES = 256  # of an image, in continuous time: one in each equal part of [0, 1]
LEVELS = 256
SPACING = 2 * HALF_BIN  # of two levels, in [−1, 1]
FAR = 9.0  # deviations from the nearest level beyond which another one has no share: e^(−½ 9²)


def prior(process: VariationalDiffusion, x0: Tensor) -> Tensor:
    """KL(q(x_1|x_0) ‖ N(0, I)) of each row (N,) of x0 (N, C, H, W): what the end of γ leaves of the data."""
    alpha_bar = 1 / (1 + math.exp(process.gamma_1))
    log_variance = -math.log1p(math.exp(-process.gamma_1))
    kl = 0.5 * (alpha_bar * (x0.square() - 1) - log_variance)
    return BITS * kl.flatten(1).mean(1)


def decoder(process: VariationalDiffusion, x0: Tensor, noise: Tensor) -> Tensor:
    """−log p(x_0 | x at t = 0) of each row (N,), where ε is `noise`: what the beginning of γ hides.

    softmax: over levels v of −½ e^(−γ_0) (x/α_0 − x_v)², as x/α_0 is x_0 + e^(γ_0/2) ε. continuous: the density of
    N(x/α_0, e^γ_0), for data that have no levels.
    """
    if process.decoder == "continuous":
        nats = 0.5 * (noise.square() + math.log(2 * math.pi) + process.gamma_0)
    else:
        nats = -log_level(x0, noise, math.exp(process.gamma_0 / 2))
    return BITS * nats.flatten(1).mean(1)


def log_level(x0: Tensor, noise: Tensor, deviation: float) -> Tensor:
    """The log of softmax_v(−½ ((x_0 + s ε − x_v)/s)²) at v = x_0, for x_0 on the 256 levels of [−1, 1]; shaped as x0.

    s: `deviation`. Only levels near the nearest one have a share in the sum, so no row of 256 is made of each pixel.
    """
    steps = SPACING / deviation  # between two levels, in deviations
    own = ((x0 + 1) / SPACING).round()
    nearest = (own + noise / steps).round().clamp(0, LEVELS - 1)
    reach = min(math.ceil(FAR / steps) + 1, LEVELS - 1)
    found = []
    for offset in range(-reach, reach + 1):
        level = nearest + offset
        logit = -0.5 * ((own - level) * steps + noise).square()
        found.append(torch.where((level < 0) | (level > LEVELS - 1), -torch.inf, logit))
    return -0.5 * noise.square() - torch.stack(found).logsumexp(0)


def squared_error(eps: Tensor, noise: Tensor) -> Tensor:
    """‖ε − ε̂‖² per dimension of each row (N,)."""
    return (eps - noise).square().flatten(1).mean(1)


@torch.no_grad()
def sums(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    process: VariationalDiffusion,
    x0: Tensor,
    noise: Callable[[int], Tensor],
    u: Tensor,
    clip: bool = False,
) -> Tensor:
    """The parts of the bound, prior, chain and decoder, summed over the rows of x0: float64 (3,).

    noise(i): standard normals shaped as x0, of the i-th evaluation, and those of the decoder for i = −1. u: float64
    (N,) in [0, 1), where each row's times lie within equal parts of [0, 1]; a chain visits each timestep. clip holds
    x̂_0 within [−1, 1], where pixels live: still a bound, and a tighter one.
    """
    chain = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    times, within = evaluations(process), u if process.timesteps is None else torch.full_like(u, 0.5)
    for i in range(times):
        gamma, weight = process.gamma_and_weight(process.time((i + within) / times))
        alpha, sigma = process.levels(gamma, x0)
        eps = noise(i)
        x_t = alpha * x0 + sigma * eps
        output = denoiser(x_t, process.told_as(gamma, x0)).to(x0.dtype)
        if clip:
            clean = ((x_t - sigma * output) / alpha).clamp(-1, 1)
            error = squared_error(alpha / sigma * clean, alpha / sigma * x0)
        else:
            error = squared_error(output, eps)
        chain += BITS * 0.5 * weight * error / times
    parts = prior(process, x0), chain, decoder(process, x0, noise(-1))
    return torch.stack([part.double().sum() for part in parts])


def evaluations(process: VariationalDiffusion) -> int:
    """How often `sums` asks the denoiser."""
    return TIMES if process.timesteps is None else process.timesteps
