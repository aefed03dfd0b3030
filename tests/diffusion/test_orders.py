"""How fast each solver's error falls with the number of steps, between two interior noise levels of a continuous path.

At the ends σ/α is infinite or 0 and no solver has its order, so the walks stop short of both.
"""

import math

import numpy as np
import pytest
import torch

from dtrain.diffusion.prediction import to_eps, to_x0
from dtrain.diffusion.samplers import ddim
from dtrain.diffusion.solvers import dpmpp_2m, euler_flow, heun, heun_flow
from tests.diffusion.gaussian_data import MEAN, STD


class Interior:
    """A continuous process from time 0.9 down to 0.2, of either kind, with the samplers' interface."""

    clean = 0.2

    def __init__(self, flow):
        self.flow, self.prediction = flow, "velocity" if flow else "eps"

    def level(self, t):
        return (1 - t, t) if self.flow else (math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t))

    def model_time(self, t, x):
        return torch.full((len(x),), t, dtype=torch.float64)

    def split(self, output):
        return output, None

    def x0(self, output, x, t):
        return to_x0(self.prediction, output, x, *self.level(t))

    def eps(self, output, x, t):
        return to_eps(self.prediction, output, x, *self.level(t))

    def walk(self, steps):
        return [0.9 - 0.7 * i / steps for i in range(steps)]

    def denoiser(self, x, t):
        alpha, sigma = self.level(float(t[0]))
        marginal = alpha**2 * STD**2 + sigma**2
        eps = sigma * (x - alpha * MEAN) / marginal
        x0 = MEAN + alpha * STD**2 * (x - alpha * MEAN) / marginal
        return eps - x0 if self.flow else eps

    def truth(self, x):
        """The probability-flow ODE keeps every point at its quantile."""
        (a, s), (b, r) = self.level(0.9), self.level(0.2)
        return b * MEAN + math.sqrt((b * b * STD**2 + r * r) / (a * a * STD**2 + s * s)) * (x - a * MEAN)


def fitted_order(solver, process):
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    counts = np.array([40, 80, 160, 320])
    errors = [
        float((solver(process.denoiser, process, x, process.walk(int(n))) - process.truth(x)).abs().max())
        for n in counts
    ]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize(("solver", "flow"), [(ddim, False), (euler_flow, True)])
def test_ddim_and_flow_euler_are_of_first_order(solver, flow):
    assert fitted_order(solver, Interior(flow)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("solver", "flow"), [(heun, False), (dpmpp_2m, False), (heun_flow, True)])
def test_heun_and_dpm_solver_are_of_second_order(solver, flow):
    assert fitted_order(solver, Interior(flow)) >= 1.8
