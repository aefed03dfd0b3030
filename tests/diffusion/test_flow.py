import math

import pytest
import torch

from dtrain.config import Flow
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.samplers import ddim, sample
from dtrain.diffusion.times import LogitNormal
from dtrain.objectives import build as objectives
from dtrain.objectives.denoising import Denoising
from tests.diffusion.gaussian_data import MEAN, STD, exact, normals
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


def test_the_configured_flow():
    built = objectives.denoising(Flow(process="flow", times="logit_normal", logit_normal_mean=0.5))
    assert built.times == LogitNormal(0.5, 1.0)
    assert float(built.place(torch.tensor([0.5]).double())) == pytest.approx(1 / (1 + math.exp(-0.5)))
