"""Why a network predicts x_0 in pixels: data on few of many dimensions, and a network that is narrower than the many.

The digits' 64 pixels lie in 512 dimensions, turned by a fixed random orthonormal matrix: the experiment of Li & He 2025
on other data. A velocity has noise in all 512, which a layer of 256 cannot hold; x_0 has 64.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from dtrain.config import Flow
from dtrain.diffusion.samplers import sample
from dtrain.evaluation.metrics.frechet import frechet_distance
from dtrain.evaluation.metrics.statistics import Statistics
from dtrain.models.layers import timestep_embedding
from dtrain.objectives import build as objectives
from tests.objectives.rows import row_losses

pytestmark = pytest.mark.campaign

SEED, MANY, WIDTH, STEPS, BATCH, SAMPLES = 0, 512, 256, 6000, 256, 2000


class Perceptron(nn.Module):
    """Five layers of WIDTH."""

    def __init__(self):
        super().__init__()
        sizes = [MANY + 64, *[WIDTH] * 5]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, MANY))

    def forward(self, x, t):
        told = torch.cat([x.flatten(1), timestep_embedding(t, 64, torch.float32)], dim=1)
        return self.layers(told).view_as(x)


def digits():
    """Those that dtrain trains on and the 360 held out, in [−1, 1], float32 (n, 64)."""
    pixels = torch.from_numpy(load_digits().data / 8 - 1).float()
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(pixels)))
    return pixels[order[360:]], pixels[order[:360]]


def distance(of, to):
    """The Fréchet distance of two sets of points."""
    found = [Statistics(len(p), p.mean(0).double().numpy(), np.cov(p.double().numpy().T)) for p in (of, to)]
    return frechet_distance(*found)


def reached(prediction, turn, train, held_out):
    """The distances of samples of a network trained to predict this: of the digits' pixels, and in all dimensions."""
    torch.manual_seed(SEED)
    model, generator = Perceptron(), torch.Generator().manual_seed(SEED)
    times = {"times": "logit_normal", "logit_normal_mean": 0.8, "logit_normal_std": 0.8}
    objective = objectives.denoising(Flow(process="flow", prediction=prediction, **times))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        x0 = (train[torch.randint(len(train), (BATCH,), generator=generator)] @ turn).view(BATCH, MANY, 1, 1)
        noise = torch.randn(x0.shape, generator=generator)
        u = torch.rand(BATCH, generator=generator, dtype=torch.float64)
        row_losses(objective, model, x0, noise, u, {}).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    x_T = torch.randn(SAMPLES, MANY, 1, 1, generator=generator)
    drawn = sample(model, objective.process, x_T, "heun", 50).flatten(1)
    return distance(drawn @ turn.T, held_out), distance(drawn, held_out @ turn)


def test_a_narrow_network_that_predicts_x0_is_five_times_nearer_than_one_that_predicts_the_velocity():
    train, held_out = digits()
    turn = torch.linalg.qr(torch.from_numpy(np.random.default_rng(SEED).standard_normal((MANY, 64))).float())[0].T
    torch.testing.assert_close(turn @ turn.T, torch.eye(64), rtol=0, atol=1e-5)
    found = {prediction: reached(prediction, turn, train, held_out) for prediction in ("x0", "velocity")}
    for prediction, (pixels, everywhere) in found.items():
        print(f"{prediction}: {pixels:.2f} of pixels, {everywhere:.2f} in all dimensions")
    print(f"the training digits: {distance(train, held_out):.2f}")
    for of_x0, of_velocity in zip(*found.values(), strict=True):
        assert distance(train, held_out) < of_x0
        assert 5 * of_x0 < of_velocity
