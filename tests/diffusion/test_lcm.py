"""The multistep sampler of one-step networks: closed forms on Gaussian data, and diffusers' own loop."""

import math

import pytest
import torch
from diffusers import LCMScheduler

from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.mean_flow import MeanFlow
from dtrain.diffusion.prediction import Partly, target
from dtrain.diffusion.samplers import network_evaluations, sample, times
from dtrain.diffusion.schedule import linear, scaled_linear, with_zero_terminal_snr
from tests.diffusion.gaussian_data import MEAN, STD, affine_std, exact, normals
from tests.diffusion.theirs import bent

CHAIN, FLOW, MEAN_FLOW = GaussianDiffusion(linear(1000)), RectifiedFlow(), MeanFlow(time_scale=1)
V = GaussianDiffusion(with_zero_terminal_snr(linear(1000)), "v")
STEPS = [1, 2, 3, 8, 50]
TOLERANCE = {CHAIN: 1e-12, V: 1e-12, FLOW: 1e-7, MEAN_FLOW: 1e-7}  # flows are told their times in float32


def walked(denoiser, process, x_T, steps, step_noise, **how):
    return sample(denoiser, process, x_T, "lcm", steps, step_noise=step_noise, **how)


def deviation(denoiser, process, steps):
    return affine_std(lambda x_T, noise: walked(denoiser, process, x_T, steps, noise), steps + 1)


# -- the posterior mean -----------------------------------------------------------------------------------------------


def closed_deviation(process, steps):
    """Of x̂_0 = E[x_0 | x_t]: var x_p = α_p² g_t² var x_t + σ_p² with g_t = α_t s²/(α_t² s² + σ_t²)."""
    levels = [process.level(t) for t in times(process, "lcm", steps, "trailing")]
    variance = None
    for alpha, sigma in levels:
        before = 1.0 if variance is None else alpha**2 * variance + sigma**2
        variance = (alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)) ** 2 * before
    return math.sqrt(variance)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("process", [CHAIN, V, FLOW])
def test_the_posterior_mean_loses_the_deviation_that_the_recursion_says(process, steps):
    found = deviation(exact(process), process, steps)
    assert found == pytest.approx(closed_deviation(process, steps), abs=TOLERANCE[process])
    assert found < 0.97 * STD  # a network of means is what this sampler is not for


@pytest.mark.parametrize("process", [CHAIN, V, FLOW])
def test_the_posterior_mean_ends_at_the_mean_of_the_data_from_that_of_the_marginal(process):
    alpha, _ = process.level(times(process, "lcm", 7, "trailing")[0])
    x_T = torch.full((1, 1, 1, 1), alpha * MEAN).double()
    found = walked(exact(process), process, x_T, 7, lambda i: torch.zeros_like(x_T))
    assert float(found) == pytest.approx(MEAN, abs=TOLERANCE[process])


# -- an exact map of one step -----------------------------------------------------------------------------------------


def consistent(process, x, time):
    """What x = x_t is led to by the exact ODE of N(m, s²): m + s (x − α m)/√(α² s² + σ²)."""
    alpha, sigma = process.level_told(time)
    return MEAN + STD * (x - alpha * MEAN) / math.hypot(alpha * STD, sigma)


def one_step(process):
    """The network whose x̂_0 that is."""

    def denoiser(x, t):
        x_0 = consistent(process, x, t[0].item())
        alpha, sigma = process.level_told(t[0].item())
        return target(process.prediction, x_0, (x - alpha * x_0) / sigma, alpha, sigma)

    return denoiser


def mean_velocity(x, told):
    """u(x_t, r, t) of N(0, s²): x (1 − σ_r/σ_t)/(t − r)."""
    t, span = (float(one) for one in told[0].double())
    of = lambda at: math.hypot(at, (1 - at) * STD)  # noqa: E731
    return x * (1 - of(t - span) / of(t)) / span


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("process", "denoiser"),
    [(V, one_step(V)), (FLOW, one_step(FLOW)), (MEAN_FLOW, mean_velocity)],
    ids=["chain", "flow", "mean flow"],
)
def test_an_exact_map_draws_the_datas_deviation_in_any_number_of_steps(process, denoiser, steps):
    assert deviation(denoiser, process, steps) == pytest.approx(STD, abs=TOLERANCE[process])
    asked = []
    counted = lambda x, t: asked.append(t) or denoiser(x, t)  # noqa: E731
    walked(counted, process, normals(1, 1, 1, 1), steps, lambda i: normals(1, 1, 1, 1, seed=i))
    assert len(asked) == network_evaluations(process, "lcm", steps) == steps


def reflowed(x, t):
    """The velocity (1 − s)/(t + (1 − t) s) · x of the straight paths from z to s z."""
    t = (t.double() / FLOW.time_scale).view(-1, 1, 1, 1)
    return (1 - STD) / (t + (1 - t) * STD) * x


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_reflowed_network_is_exact_in_one_step_and_is_shown_foreign_states_in_more(steps):
    """Its paths join z with s z, so x_t has deviation t + (1 − t) s; new noise leaves √(t² + (1 − t)² s²)."""
    closed = STD
    for p in times(FLOW, "lcm", steps, "trailing")[1:]:
        closed = STD * math.hypot(p, (1 - p) * closed) / (p + (1 - p) * STD)
    assert deviation(reflowed, FLOW, steps) == pytest.approx(closed, abs=1e-7)
    assert (closed == STD) == (steps == 1)


# -- beside an independent loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_it_is_theirs_where_their_network_is_all_output(monkeypatch, prediction, clip):
    """Their x̂_0 is c_skip x + c_out (…): with an endless scale of timesteps c_skip is 0 and c_out 1."""
    theirs = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction]
    scheduler = LCMScheduler(1000, prediction_type=theirs, clip_sample=clip, timestep_scaling=1e12)
    schedule, shape, drawn = scaled_linear(1000), (2, 1, 4, 4), iter(range(100))
    scheduler.alphas_cumprod = schedule.alpha_bar
    noise = lambda i: normals(*shape, seed=100 + i)  # noqa: E731
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: noise(next(drawn)))
    scheduler.set_timesteps(timesteps=[999, 759, 499, 259])
    x = x_T = normals(*shape)
    for t in scheduler.timesteps:
        x = scheduler.step(bent(x, t.expand(2)), t, x).prev_sample
    ours = GaussianDiffusion(schedule, prediction)
    found = walked(bent, ours, x_T, 4, noise, spacing=[999, 759, 499, 259], clip=clip)
    assert x.dtype == torch.float64
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
    assert clip == bool(found.abs().max() <= 1)


def test_a_mean_flow_takes_its_one_step_to_clean_data_each_time_and_may_hold_it_in_range():
    network = lambda x, told: torch.sin(3 * x) + told.double().sum(1).view(-1, 1, 1, 1)  # noqa: E731
    noise = lambda i: normals(2, 1, 4, 4, seed=100 + i)  # noqa: E731
    for clip in (False, True):
        x = x_T = normals(2, 1, 4, 4)
        for i, t in enumerate((1.0, 0.75, 0.5, 0.25)):
            x = x - t * network(x, torch.tensor([[t, t]] * 2))
            x = x.clip(-1, 1) if clip else x
            x = x if t == 0.25 else (1 - (t - 0.25)) * x + (t - 0.25) * noise(i)
        torch.testing.assert_close(walked(network, MEAN_FLOW, x_T, 4, noise, clip=clip), x, rtol=0, atol=1e-12)


def test_what_is_known_of_a_picture_is_walked_to_by_a_mean_flow():
    known, anew = 0.3 * normals(50, 1, 2, 2, seed=9), torch.tensor([True, False, True, False]).view(1, 1, 2, 2)
    noise = lambda i: normals(50, 1, 2, 2, seed=100 + i)  # noqa: E731
    x_T, kept = normals(50, 1, 2, 2), ~anew.expand_as(known)
    found = walked(lambda x, told: Partly(mean_velocity(x, told), known, anew), MEAN_FLOW, x_T, 4, noise)
    torch.testing.assert_close(found[kept], known[kept], rtol=0, atol=1e-12)
    assert torch.equal(found[~kept], walked(mean_velocity, MEAN_FLOW, x_T, 4, noise)[~kept])
