"""A mixture of three Gaussians over images of 2 × 2 pixels, and the model that knows its score exactly."""

import math

import numpy as np
import torch

from dtrain.diffusion.prediction import target

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-0.4, 0.1, 0.3, -0.2], [0.3, 0.4, -0.3, 0.1], [0.2, -0.4, 0.1, 0.4]], dtype=torch.float64)
STD = 0.08  # so that nothing of the mixture lies outside the pixels' [−1, 1]


def drawn(n, seed=0):
    """n points of the mixture, float64 (n, 4)."""
    rng = np.random.default_rng(seed)
    return MEANS[rng.choice(3, n, p=WEIGHTS.numpy())] + STD * torch.from_numpy(rng.standard_normal((n, 4)))


def log_density_of_mixture(points):
    """log p of points (N, 4), float64 (N,)."""
    away = (points[:, None] - MEANS).square().sum(2) / STD**2
    return torch.logsumexp(WEIGHTS.log() - 0.5 * away - 2 * math.log(2 * math.pi * STD**2), 1)


class ExactMixture(torch.nn.Module):
    """E[target | x_t] of images (N, 1, 2, 2) that are drawn from the mixture."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x, t, y):
        time = t[0].item()
        alpha, sigma = self.process.level_told(time)
        points, variance = x.double().flatten(1)[:, None], alpha**2 * STD**2 + sigma**2
        away = points - alpha * MEANS  # (N, 3, 4)
        share = torch.softmax(WEIGHTS.log() - away.square().sum(2) / (2 * variance), dim=1)[:, :, None]
        x0 = (share * (MEANS + alpha * STD**2 / variance * away)).sum(1).view_as(x)
        eps = (share * (sigma / variance * away)).sum(1).view_as(x)
        return target(self.process.prediction, x0, eps, alpha, sigma).to(x.dtype)
