"""A mixture of Gaussians, whose score is known: every sampler reaches it as the steps grow."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from dtrain.diffusion.edm import EDM
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.prediction import target
from dtrain.diffusion.samplers import sample
from dtrain.diffusion.schedule import cosine, linear
from dtrain.diffusion.solvers import Churn
from tests.longer import mostly_longer

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 0.2], [0.8, 0.9], [0.6, -1.1]], dtype=torch.float64)
STD = 0.25
N = 4000


def exact(process):
    """E[target | x_t] of pixels (N, 2, 1, 1), each row a point of the plane."""

    def denoiser(x, t):
        time = t[0].item()
        alpha, sigma = process.level_told(time)
        points, variance = x.view(-1, 1, 2), alpha**2 * STD**2 + sigma**2
        away = points - alpha * MEANS  # (N, 3, 2)
        share = torch.softmax(WEIGHTS.log() - away.square().sum(2) / (2 * variance), dim=1)[:, :, None]
        x0 = (share * (MEANS + alpha * STD**2 / variance * away)).sum(1).view_as(x)
        eps = (share * (sigma / variance * away)).sum(1).view_as(x)
        output = target(process.prediction, x0, eps, alpha, sigma)
        return torch.cat([output, torch.zeros_like(x)], 1) if process.split(output)[1] is not None else output

    return denoiser


def frechet(points):
    """To the mixture's own mean and covariance."""
    mean = (WEIGHTS[:, None] * MEANS).sum(0).numpy()
    spread = (MEANS - torch.from_numpy(mean)).numpy()
    covariance = STD**2 * np.eye(2) + (WEIGHTS.numpy()[:, None, None] * spread[:, :, None] * spread[:, None]).sum(0)
    points = points.view(-1, 2).numpy()
    found = np.cov(points.T)
    return float(
        ((points.mean(0) - mean) ** 2).sum() + np.trace(found + covariance - 2 * sqrtm(found @ covariance).real)
    )


def null():
    """The largest distance in fifty draws of N points from the mixture itself."""
    distances = []
    for seed in range(50):
        generator = np.random.default_rng(seed)
        which = generator.choice(3, N, p=WEIGHTS.numpy())
        distances.append(frechet(MEANS[which] + STD * torch.from_numpy(generator.standard_normal((N, 2)))))
    return max(distances)


WALKS = {
    "ddim": (GaussianDiffusion(linear(1000)), "ddim", 0.0),
    "ddim-0.5": (GaussianDiffusion(linear(1000)), "ddim", 0.5),
    "ddim-sigma_hat": (GaussianDiffusion(linear(1000)), "ddim", "sigma_hat"),
    "ddim-v-cosine": (GaussianDiffusion(cosine(1000), "v"), "ddim", 0.0),
    "fixed_small": (GaussianDiffusion(linear(1000)), "ancestral", 0.0),
    "fixed_large": (GaussianDiffusion(linear(1000), variance="fixed_large"), "ancestral", 0.0),
    "learned_range": (GaussianDiffusion(linear(1000), variance="learned_range"), "ancestral", 0.0),
    "dpmpp_2m": (GaussianDiffusion(linear(1000)), "dpmpp_2m", 0.0),
    "heun": (GaussianDiffusion(linear(1000)), "heun", 0.0),
    "flow-euler": (RectifiedFlow(), "euler", 0.0),
    "flow-heun": (RectifiedFlow(), "heun", 0.0),
    "edm-heun": (EDM(), "heun", 0.0),
    "edm-euler": (EDM(), "euler", 0.0),
    "edm-dpmpp_2m": (EDM(), "dpmpp_2m", 0.0),
    "edm-ddim-1": (EDM(), "ddim", 1.0),
    "edm-churn": (EDM(), "heun", 0.0, Churn(40.0)),
}


@pytest.mark.parametrize(
    "walk",
    mostly_longer(WALKS, ["ddim", "ddim-sigma_hat", "fixed_small", "dpmpp_2m", "heun", "flow-euler", "edm-churn"]),
)
def test_the_frechet_distance_of_exact_samples_falls_to_the_null_value(walk):
    process, sampler, eta, *churn = WALKS[walk]
    generator = np.random.default_rng(0)

    def draw(i):
        return torch.from_numpy(generator.standard_normal((N, 2, 1, 1)))

    distances = []
    for steps in (3, 12, 250):
        x = sample(
            exact(process),
            process,
            draw(0),
            sampler,
            steps,
            eta=eta,
            step_noise=draw,
            churn=churn[0] if churn else None,
        )
        distances.append(frechet(x))
    assert distances[0] > distances[1]
    assert distances[0] > 10 * distances[2]
    assert distances[2] < null()
