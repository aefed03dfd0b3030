"""Data for which every network is known exactly: N(m, s²), and mixtures of Gaussians, per pixel."""

import math

import numpy as np
import torch

from dtrain.diffusion.prediction import target

MEAN, STD = 0.3, 0.5
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def normals(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def exact_eps(x, alpha, sigma, mean=MEAN, std=STD):
    """E[ε | x = α x_0 + σ ε]."""
    return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)


def exact(process, mean=MEAN, std=STD):
    """The denoiser that answers E[target | x_t] for one-timestep batches of any process with level(t)."""

    def denoiser(x, t):
        time = t[0].item()
        alpha, sigma = process.level_told(time)
        eps = exact_eps(x, alpha, sigma, mean, std)
        x0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        return target(process.prediction, x0, eps, alpha, sigma)

    return denoiser


def affine_std(sampler, draws):
    """The standard deviation of what an affine sampler makes of unit normals, without sampling error.

    sampler(x_T, step_noise) → x_0 of (N, 1, 1, 1); row j gets a unit of normal j (x_T is the last) and one row none.
    """
    unit = torch.eye(draws + 1, dtype=torch.float64)
    response = sampler(unit[:, draws - 1].view(-1, 1, 1, 1), lambda i: unit[:, i].view(-1, 1, 1, 1)).flatten()
    return float((response[:-1] - response[-1]).square().sum().sqrt())


def closed_std(timesteps, added, alpha_bar=ALPHA_BAR, std=STD):
    """The standard deviation of x_0 for exact ε along listed timesteps: var_p = c² var_t + noise².

    added(a, p, last) → (variance in the direction term, variance of the noise drawn), from ᾱ_t and ᾱ_p.
    """
    variance = 1.0
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        a, p = alpha_bar[t], 1.0 if last else alpha_bar[timesteps[i + 1]]
        direction, noise = added(a, p, last)
        c = (math.sqrt(a * p) * std**2 + math.sqrt((1 - p - direction) * (1 - a))) / (a * std**2 + 1 - a)
        variance = c**2 * variance + noise
    return math.sqrt(variance)
