import math
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from dtrain.config import Flow
from dtrain.diffusion import solvers
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.guidance import guided
from dtrain.diffusion.projection import projection
from dtrain.diffusion.samplers import ddim, encode, sample
from dtrain.diffusion.times import LogitNormal
from dtrain.objectives import build as objectives
from dtrain.objectives.denoising import Denoising
from tests.diffusion.gaussian_data import MEAN, STD, affine_std, exact, exact_eps, normals
from tests.objectives.rows import row_losses

flow = RectifiedFlow()
of_x0 = RectifiedFlow(prediction="x0")
both = pytest.mark.parametrize("process", [flow, of_x0], ids=["velocity", "x0"])


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


def test_of_an_x0_the_velocity_is_exact_and_the_loss_none():
    x0, noise, t = normals(4, 1, 2, 2), normals(4, 1, 2, 2, seed=1), torch.tensor([0.05, 0.3, 0.7, 1.0]).double()
    x_t = of_x0.noised(x0, noise, t)
    velocity = of_x0.eps(x0, x_t, t) - of_x0.x0(x0, x_t, t)
    torch.testing.assert_close(velocity, noise - x0, rtol=0, atol=1e-12)
    for time in (0.05, 0.3, 1.0):  # samplers give one time for all rows
        x_t = of_x0.noised(x0, noise, time)
        torch.testing.assert_close(of_x0.eps(x0, x_t, time), noise, rtol=0, atol=1e-12)
    assert row_losses(Denoising(of_x0), lambda x, t: x0, x0, noise, t, {}).abs().max() == 0


@pytest.mark.parametrize("least", [0.05, 0.2])
def test_the_loss_of_an_x0_is_the_squared_error_of_the_velocity_as_it_is_written(least):
    """v̂ = (x_t − x̂)/max(t, d) against (x_t − x_0)/max(t, d); from t = d on it is the loss of a network that says v̂."""
    x0, noise, off = normals(5, 2, 3, 3), normals(5, 2, 3, 3, seed=1), normals(5, 2, 3, 3, seed=2)
    t = torch.tensor([0.0, 0.01, 0.05, 0.2, 0.999]).double()
    process = RectifiedFlow(prediction="x0", least_time=least)
    found = row_losses(Denoising(process), lambda x, told: x0 + off, x0, noise, t, {})
    divisor = torch.tensor([max(float(time), least) for time in t], dtype=torch.float64).view(-1, 1, 1, 1)
    x_t = process.noised(x0, noise, t)
    written = ((x_t - (x0 + off)) / divisor - (x_t - x0) / divisor).square().mean((1, 2, 3))
    torch.testing.assert_close(found, written, rtol=1e-12, atol=1e-12)
    for i, time in enumerate(t.tolist()):
        assert float(process.error(x0 + off, x0, noise, time)[i].square().mean()) == pytest.approx(float(found[i]))
    late = t >= least
    says = (x_t - (x0 + off)) / t.view(-1, 1, 1, 1)
    of_v = row_losses(Denoising(flow), lambda x, told: says, x0, noise, t, {})
    torch.testing.assert_close(found[late], of_v[late], rtol=1e-10, atol=1e-10)


def test_guidance_of_an_x0_is_guidance_of_its_velocity():
    """Both are linear in the output with coefficients that add up to 1, so that every walk is the same."""
    null = lambda condition: {"y": torch.full_like(condition["y"], 9)}  # noqa: E731
    x_T, y = normals(3, 1, 2, 2), torch.tensor([1, 2, 3])

    def x0_of(x, t, y):
        return torch.tanh(x * (1 + y.view(-1, 1, 1, 1))) + t.view(-1, 1, 1, 1) / 1000

    def velocity_of(x, t, y):
        return (x - x0_of(x, t, y)) / (t / 1000).view(-1, 1, 1, 1)

    for how in ({}, {"rescale": 0.0, "interval": (0.2, 0.8)}):
        ends = []
        for process, model in ((flow, velocity_of), (of_x0, x0_of)):
            led = guided(model, 2.5, null, **how)
            exactly = RectifiedFlow(prediction=process.prediction)
            ends.append(sample(lambda x, t, led=led: led(x, t.double(), y=y), exactly, x_T, "heun", 9))
        torch.testing.assert_close(*ends, rtol=0, atol=3e-5)  # the model's time is a float32


def test_projected_guidance_of_an_x0_is_that_of_its_velocity():
    """APG judges differences as those of x̂_0."""
    x, towards, away = normals(2, 1, 2, 2), normals(2, 1, 2, 2, seed=1), normals(2, 1, 2, 2, seed=2)
    t, time = 0.4, torch.full((2,), 400.0)
    of = {
        of_x0: (towards, towards - away),
        flow: ((x - towards) / t, ((x - towards) - (x - away)) / t),
    }
    kept = {p: projection(p, 0.7, 0.5, -0.3)(0, change, answer, x, time) for p, (answer, change) in of.items()}
    torch.testing.assert_close(-t * kept[flow], kept[of_x0], rtol=0, atol=1e-7)


def closed_std(steps):
    """Euler's product for exact velocities: v = k(t) (x − mean), with marginal variance s² (1 − t)² + t²."""
    slope = 1.0
    for i in range(steps):
        t = 1 - i / steps
        slope *= 1 - (t - STD**2 * (1 - t)) / (STD**2 * (1 - t) ** 2 + t**2) / steps
    return slope


@both
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_euler_on_gaussian_data_is_the_closed_product(process, steps):
    x_T = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1)
    zero, one = sample(exact(process), process, x_T, "euler", steps).flatten()
    assert float(zero) == pytest.approx(MEAN, abs=1e-10)
    assert float(one - zero) == pytest.approx(closed_std(steps), abs=2e-7)  # the model's time is a float32


@both
def test_heun_needs_fewer_steps_than_euler(process):
    x_T = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1)
    errors = {}
    for sampler, steps in (("euler", 40), ("heun", 20)):
        zero, one = sample(exact(process), process, x_T, sampler, steps).flatten()
        errors[sampler] = abs(float(one - zero) - STD)
    assert errors["heun"] < errors["euler"] / 2


@both
def test_deterministic_ddim_on_a_flow_is_euler(process):
    x_T = normals(3, 1, 2, 2)
    euler = sample(exact(process), process, x_T, "euler", 13)
    torch.testing.assert_close(ddim(exact(process), process, x_T, process.walk(13)), euler, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_every_walk_of_an_x0_is_that_of_its_velocity_and_so_is_the_way_back(sampler):
    x_T = normals(4, 1, 2, 2)
    noise = [normals(4, 1, 2, 2, seed=9 + i) for i in range(20)]
    ends, backs = [], []
    for process in (flow, of_x0):
        model = exact(process)
        ends.append(sample(model, process, x_T, sampler, 20, step_noise=lambda i: noise[i]))
        backs.append(encode(model, process, MEAN + STD * x_T, process.walk(20)))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-7)  # the model's time is a float32
    torch.testing.assert_close(*backs, rtol=0, atol=1e-7)


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
    assert (built.process.prediction, built.process.least_time) == ("velocity", 0.05)
    other = objectives.denoising(Flow(process="flow", prediction="x0", least_time=0.1)).process
    assert (other.prediction, other.least_time) == ("x0", 0.1)
    with pytest.raises(ValidationError, match=r"least_time 0.1 has no effect on prediction velocity"):
        Flow(process="flow", least_time=0.1)
    assert built.times == LogitNormal(0.5, 1.0)
    assert float(built.place(torch.tensor([0.5]).double())) == pytest.approx(1 / (1 + math.exp(-0.5)))
