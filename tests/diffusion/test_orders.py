"""How fast each solver's error falls with the number of steps, between two interior noise levels of a continuous path.

At the ends σ/α is infinite or 0 and no solver has its order, so the walks stop short of both.
"""

import math

import numpy as np
import pytest
import torch

from dtrain.diffusion.prediction import to_eps, to_x0
from dtrain.diffusion.samplers import ddim
from dtrain.diffusion.solvers import dpmpp_2m, dpmpp_3m, euler_flow, heun, heun_flow, unipc
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


def test_unipc_is_of_third_order():
    assert fitted_order(unipc, Interior(flow=False)) >= 2.8


class Parabola(Interior):
    """x̂_0 = 0.3 + 0.2 λ − 0.1 λ² whatever x is, λ = log α/σ: the ODE is an integral that can be written out."""

    def __init__(self):
        super().__init__(flow=False)
        self.prediction = "x0"

    def log_ratio(self, t):
        alpha, sigma = self.level(t)
        return math.log(alpha / sigma)

    def denoiser(self, x, t):
        at = self.log_ratio(float(t[0]))
        return torch.full_like(x, 0.3 + 0.2 * at - 0.1 * at**2)

    def exactly(self, x, t, p):
        """x_p/σ_p = x_t/σ_t + ∫ e^λ x̂_0 dλ; its antiderivative is e^λ (0.3 − 0.2 − 0.2 + (0.2 + 0.2) λ − 0.1 λ²)."""
        whole = lambda at: math.exp(at) * (-0.1 + 0.4 * at - 0.1 * at**2)  # noqa: E731
        (_, here), (_, there) = self.level(t), self.level(p)
        return there * (x / here + whole(self.log_ratio(p)) - whole(self.log_ratio(t)))


def test_with_three_points_the_third_order_is_exact_for_a_parabola():
    """The first two steps have fewer; every further one adds no error to what these have left."""
    process, x = Parabola(), torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    times = process.walk(9)
    begun = dpmpp_3m(process.denoiser, _until(process, times[2]), x, times[:2])
    found = dpmpp_3m(process.denoiser, process, x, times)
    torch.testing.assert_close(found, process.exactly(begun, times[2], process.clean), rtol=0, atol=1e-12)
    assert (found - process.exactly(x, times[0], process.clean)).abs().max() > 1e-4  # of the first two steps


def test_a_corrected_step_of_unipc_is_exact_for_a_parabola():
    """The first step, of two points, is not; those after it add no error to what it has left."""
    process, x = Parabola(), torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    times = process.walk(9)

    def corrected(count):
        """The state at times[count], from where the walk then took a step of 2M, which has no corrector behind it."""
        found = unipc(process.denoiser, _until(process, times[count + 1]), x, times[: count + 1])
        (alpha_t, sigma_t), (alpha_p, sigma_p) = process.level(times[count]), process.level(times[count + 1])
        start, here, there = (process.log_ratio(times[i]) for i in (count - 1, count, count + 1))
        before, x0 = (process.denoiser(x, process.model_time(times[i], x)) for i in (count - 1, count))
        guess = x0 + (there - here) / (2 * (here - start)) * (x0 - before)
        decay = sigma_p * alpha_t / (sigma_t * alpha_p)
        return (found - alpha_p * (1 - decay) * guess) * sigma_t / sigma_p

    first = corrected(1)
    for count in (2, 4, 7):
        exactly = process.exactly(first, times[1], times[count])
        torch.testing.assert_close(corrected(count), exactly, rtol=0, atol=1e-12)
    assert (first - process.exactly(x, times[0], times[1])).abs().max() > 1e-4


def _until(process, time):
    """The process whose walks end at this time."""
    other = Parabola()
    other.clean = time
    return other


def test_dpm_solver_of_three_points_is_nearer_than_of_two():
    process = Interior(flow=False)
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    for steps in (20, 40):
        off = [(solver(process.denoiser, process, x, process.walk(steps)) - process.truth(x)).abs().max()
               for solver in (dpmpp_2m, dpmpp_3m)]  # fmt: skip
        assert off[1] < off[0]
