import math
from itertools import pairwise

import pytest
import torch

from dtrain.config import Flow
from dtrain.diffusion import solvers
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.samplers import ddim, sample
from dtrain.diffusion.times import LogitNormal
from dtrain.objectives import build as objectives
from dtrain.objectives.denoising import Denoising
from tests.diffusion.gaussian_data import MEAN, STD, affine_std, exact, exact_eps, normals
from tests.objectives.rows import row_losses

flow = RectifiedFlow()


def test_the_path_is_straight_from_data_to_noise():
    x0, noise, t = normals(3, 1, 2, 2), normals(3, 1, 2, 2, seed=1), torch.tensor([0.0, 0.25, 1.0])
    x_t = flow.noised(x0, noise, t)
    torch.testing.assert_close(x_t, torch.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]]), rtol=0, atol=1e-15)
    torch.testing.assert_close(flow.noised(x0[1:2], noise[1:2], 0.25), x_t[1:2], rtol=0, atol=1e-15)
    assert flow.noised(x0.float(), noise.float(), t).dtype == torch.float32


def test_the_velocity_of_the_path_has_no_loss_and_the_model_is_told_a_thousand_t():
    x0, noise = normals(4, 1, 2, 2).float(), normals(4, 1, 2, 2, seed=1).float()
    u, labels = torch.tensor([0.0, 0.3, 0.7, 0.999]).double(), torch.tensor([0, 1, 2, 3])
    seen = {}

    def model(x, t, y):
        seen.update(t=t, y=y)
        return noise - x0 + y.view(-1, 1, 1, 1)

    losses = row_losses(Denoising(flow), model, x0, noise, u, {"y": labels})
    torch.testing.assert_close(losses, labels.float() ** 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen["t"], (1000 * u).float())
    assert losses.dtype == torch.float32


def test_velocity_says_what_x0_and_eps_are():
    x0, noise, t = normals(3, 1, 2, 2), normals(3, 1, 2, 2, seed=1), torch.tensor([0.01, 0.5, 1.0]).double()
    x_t = flow.noised(x0, noise, t)
    torch.testing.assert_close(flow.x0(noise - x0, x_t, t), x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(flow.eps(noise - x0, x_t, t), noise, rtol=0, atol=1e-14)


def closed_std(steps):
    """Euler's product for exact velocities: v = k(t) (x − mean), with marginal variance s² (1 − t)² + t²."""
    slope = 1.0
    for i in range(steps):
        t = 1 - i / steps
        slope *= 1 - (t - STD**2 * (1 - t)) / (STD**2 * (1 - t) ** 2 + t**2) / steps
    return slope


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_euler_on_gaussian_data_is_the_closed_product(steps):
    x_T = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1)
    zero, one = sample(exact(flow), flow, x_T, "euler", steps).flatten()
    assert float(zero) == pytest.approx(MEAN, abs=1e-10)
    assert float(one - zero) == pytest.approx(closed_std(steps), abs=2e-7)  # the model's time is a float32


def test_heun_needs_fewer_steps_than_euler():
    x_T = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1)
    errors = {}
    for sampler, steps in (("euler", 40), ("heun", 20)):
        zero, one = sample(exact(flow), flow, x_T, sampler, steps).flatten()
        errors[sampler] = abs(float(one - zero) - STD)
    assert errors["heun"] < errors["euler"] / 2


def test_deterministic_ddim_on_a_flow_is_euler():
    x_T = normals(3, 1, 2, 2)
    euler = sample(exact(flow), flow, x_T, "euler", 13)
    torch.testing.assert_close(ddim(exact(flow), flow, x_T, flow.walk(13)), euler, rtol=0, atol=1e-12)


def slopes(t, noise):
    """(a, w) of the SDE of exact velocities dx = a(t) (x − its mean) dt + …, and σ_t²."""
    variance = STD**2 * (1 - t) ** 2 + t**2
    w = {"2t": 2 * t, "t": t, "sine": math.sin(math.pi * t) ** 2}[noise]
    return (t - STD**2 * (1 - t) + w / 2) / variance, w, variance


@pytest.mark.parametrize("noise", ["2t", "t", "sine"])
def test_the_drift_of_the_sde_keeps_the_marginals_of_the_flow_whatever_its_noise(noise):
    """Backwards in time dV/dt = 2 a V − w must be dσ_t²/dt; a is what a step of the sampler does."""
    for t in (0.05, 0.3, 0.7, 0.95):
        dt = 1e-3
        unit = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1)
        rng = [unit * 0, torch.ones_like(unit)]  # no noise, and a unit of it
        still, moved = (_one_step(unit, t, t - dt, noise, z) for z in rng)
        a = (1 - float(still[1] - still[0])) / dt
        w = float((moved - still)[0]) ** 2 / dt
        variance = STD**2 * (1 - t) ** 2 + t**2
        assert 2 * a * variance - w == pytest.approx(2 * t - 2 * STD**2 * (1 - t), abs=1e-10)


def _one_step(x, t, p, noise, z):
    taken = []

    def watched(x, time):
        taken.append(x)
        return velocity(x, t if len(taken) == 1 else p)

    solvers.sde_flow(watched, flow, x, [t, p], lambda i: z, noise=noise)
    return taken[1]


def velocity(x, t):
    """Exact, of a time that no float32 has rounded."""
    eps = exact_eps(x, 1 - t, t)
    return eps - (x - t * eps) / (1 - t) if t < 1 else eps - MEAN


@pytest.mark.parametrize("noise", ["2t", "t", "sine"])
def test_the_variance_of_the_sde_is_its_linear_recursion_and_nears_the_datas_as_one_over_the_steps(noise):
    off = []
    for steps in (25, 100, 400):
        times = solvers.times_of_sde(steps)
        assert (times[0], len(times)) == (1.0, steps)
        assert times[-1] == pytest.approx(0.04, abs=1e-15)
        places = iter(times)
        found = affine_std(
            lambda x_T, z, places=places, times=times: solvers.sde_flow(
                lambda x, t: velocity(x, next(places)), flow, x_T, times, z, noise=noise
            ),
            steps,
        )
        variance, at_last = 1.0, None
        for t, p in pairwise([*times, 0.0]):
            a, w, of_flow = slopes(t, noise)
            if p == 0.0:
                at_last = abs(variance - of_flow)
                a, w = a - w / (2 * of_flow), 0.0
            variance = (1 - a * (t - p)) ** 2 * variance + w * (t - p)
        assert found**2 == pytest.approx(variance, abs=1e-10)
        off.append(at_last)
    assert off[0] / off[1] == pytest.approx(4, rel=0.35)
    assert off[1] / off[2] == pytest.approx(4, rel=0.15)


def test_the_configured_flow():
    built = objectives.denoising(Flow(process="flow", times="logit_normal", logit_normal_mean=0.5))
    assert built.times == LogitNormal(0.5, 1.0)
    assert float(built.place(torch.tensor([0.5]).double())) == pytest.approx(1 / (1 + math.exp(-0.5)))
