"""EDM's process against the paper's equations written out on y = x_0 + σ n, and against diffusers' scheduler."""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler
from scipy.stats import norm

from dtrain.config import EDM as Section
from dtrain.diffusion.edm import EDM
from dtrain.diffusion.prediction import to_x0
from dtrain.diffusion.process import build
from dtrain.diffusion.projection import projection
from dtrain.diffusion.samplers import encode, sample
from dtrain.diffusion.solvers import Churn, heun_churned
from dtrain.objectives import build as objectives
from dtrain.objectives.denoising import Denoising
from tests.diffusion.gaussian_data import exact, normals
from tests.diffusion.theirs import InFloat64, bent
from tests.objectives.rows import row_losses

SIGMA_DATA = 0.7
process = EDM(SIGMA_DATA)
SIGMAS = torch.tensor([0.002, 0.05, 0.7, 3.0, 80.0]).double()
ROWS = 200_000


def coefficients(sigma, sigma_data=SIGMA_DATA):
    """c_skip, c_out, c_in and λ as in Karras et al. 2022, table 1."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total**0.5, 1 / total**0.5, total / (sigma * sigma_data) ** 2


def denoised(y, sigma, network=bent):
    """D(y; σ) around a network that is told what our process tells it."""
    c_skip, c_out, c_in, _ = coefficients(sigma)
    return c_skip * y + c_out * network(c_in * y, process.model_time(sigma, y).double())


@pytest.mark.parametrize("sigma", SIGMAS.tolist())
def test_what_an_output_stands_for_is_the_papers_and_its_loss_is_that_of_d_times_lambda(sigma):
    x0, noise, output = (normals(2, 1, 3, 3, seed=seed) for seed in range(3))
    y = x0 + sigma * noise
    c_skip, c_out, c_in, weight = coefficients(sigma)
    for t in (sigma, torch.full((2,), sigma).double()):
        x = process.noised(x0, noise, t)
        torch.testing.assert_close(x, c_in * y, rtol=1e-12, atol=0)
        d = c_skip * y + c_out * output
        torch.testing.assert_close(process.x0(output, x, t), d, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(process.eps(output, x, t), (y - d) / sigma, rtol=1e-9, atol=1e-10 / sigma)
        target = process.target(x0, noise, t)
        torch.testing.assert_close(process.x0(target, x, t), x0, rtol=1e-12, atol=1e-12)
        error = process.error(output, x0, noise, t)
        torch.testing.assert_close(error.square(), weight * (d - x0).square(), rtol=1e-8, atol=1e-8)
    told = process.model_time(sigma, y)
    alpha, level = process.level_told(told[0].item())
    torch.testing.assert_close(torch.tensor([alpha, level]), torch.tensor([c_in, c_in * sigma]), rtol=1e-6, atol=0)
    torch.testing.assert_close(to_x0("edm", output, x, *process.level(sigma)), d, rtol=1e-9, atol=1e-9)
    found = projection(process, 1.0, None, 0.0).x0(output, x, told)
    torch.testing.assert_close(found, d, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", SIGMAS.tolist())
def test_input_and_target_have_unit_variance_and_the_posterior_mean_needs_no_network(sigma):
    """On N(0, σ_data²): input and target have variance 1, and D* is c_skip y, so the target's mean given y is 0."""
    unit = torch.eye(2).double().view(2, 2, 1, 1, 1)  # x_0/σ_data and n apart: all else is linear in them
    x = [process.noised(SIGMA_DATA * a, b, sigma).item() for a, b in unit.unbind(1)]
    target = [process.target(SIGMA_DATA * a, b, sigma).item() for a, b in unit.unbind(1)]
    assert math.hypot(*x) == pytest.approx(1, abs=1e-12)
    assert math.hypot(*target) == pytest.approx(1, abs=1e-12)
    assert np.dot(x, target) == pytest.approx(0, abs=1e-12)  # Gaussian, so E[target | x] is 0
    y = normals(4, 1, 2, 2)
    c_skip, _, c_in, _ = coefficients(sigma)
    posterior_mean = SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma**2) * y
    for t in (sigma, torch.full((4,), sigma).double()):
        found = process.x0(torch.zeros_like(y), c_in * y, t)
        torch.testing.assert_close(found, posterior_mean, rtol=0, atol=1e-10)
    assert c_skip == pytest.approx(posterior_mean.flatten()[0].item() / y.flatten()[0].item(), abs=1e-12)


def test_an_output_of_zero_has_loss_1_at_every_level():
    u = (torch.arange(ROWS).double() + 0.5) / ROWS
    rng = np.random.default_rng(0)
    x0, noise = (torch.from_numpy(rng.standard_normal((ROWS, 1, 1, 1))) for _ in range(2))
    losses = row_losses(Denoising(process), lambda x, t: torch.zeros_like(x), SIGMA_DATA * x0, noise, u, {})
    for level in losses.view(8, -1).mean(1).tolist():
        assert level == pytest.approx(1, abs=4 * (2 * 8 / ROWS) ** 0.5)


def test_ln_sigma_is_the_normals_quantile_of_the_place_and_has_no_end():
    place = torch.tensor([0.0, 0.01, 0.5, 0.99, 1 - 2**-53], dtype=torch.float64)
    sigma = EDM(noise_mean=-0.4, noise_std=1.1).time(place)
    expected = np.exp(norm.ppf(place.clamp(min=2**-53).numpy(), -0.4, 1.1))
    np.testing.assert_allclose(sigma.numpy(), expected, rtol=1e-10)
    assert sigma.isfinite().all()
    assert process.model_time(sigma, sigma).isfinite().all()


def test_the_model_is_told_a_multiple_of_ln_sigma_from_0_to_1000():
    told = process.model_time(SIGMAS, SIGMAS)
    assert told[[0, -1]].tolist() == pytest.approx([0, 1000], abs=1e-4)
    slopes = told.double().diff() / SIGMAS.log().diff()
    torch.testing.assert_close(slopes, slopes[0].expand(4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [2, 5, 18, 50])
def test_the_walk_and_eulers_steps_are_theirs(monkeypatch, steps):
    monkeypatch.setattr("diffusers.schedulers.scheduling_edm_euler.torch", InFloat64())
    scheduler = EDMEulerScheduler(sigma_data=SIGMA_DATA)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(
        scheduler.sigmas[:-1], torch.tensor(process.walk(steps), dtype=torch.float64), rtol=1e-12, atol=0
    )
    x_T = normals(2, 1, 4, 4)
    y = x_T * math.hypot(80, SIGMA_DATA)  # theirs is √(80² + 1), as if σ_data were 1
    assert scheduler.init_noise_sigma == pytest.approx(math.hypot(80, 1))
    for t, sigma in zip(scheduler.timesteps, process.walk(steps), strict=True):
        assert t == pytest.approx(math.log(sigma) / 4, abs=1e-12)
        scaled = scheduler.scale_model_input(y, t)
        y = scheduler.step(bent(scaled, process.model_time(sigma, y).double()), t, y).prev_sample
    assert y.dtype == torch.float64
    for sampler in ("euler", "ddim"):
        torch.testing.assert_close(sample(bent, process, x_T, sampler, steps), y, rtol=1e-9, atol=1e-9)


def algorithm_2(y, sigmas, churn, low, high, s_noise, draw):
    """Karras et al. 2022, algorithm 2, on y = x_0 + σ n; algorithm 1 where churn is 0."""
    n = len(sigmas)
    for i, (t, after) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= t <= high else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            y = y + math.sqrt(t_hat**2 - t**2) * s_noise * draw(i)
        d = (y - denoised(y, t_hat)) / t_hat
        ahead = y + (after - t_hat) * d
        if after != 0:
            d_ahead = (ahead - denoised(ahead, after)) / after
            ahead = y + (after - t_hat) * (d / 2 + d_ahead / 2)
        y = ahead
    return y


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_heun_is_algorithm_1(steps):
    x_T = normals(2, 1, 4, 4)
    y = algorithm_2(x_T * math.hypot(80, SIGMA_DATA), process.walk(steps), 0, 0, math.inf, 1, None)
    torch.testing.assert_close(sample(bent, process, x_T, "heun", steps), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("steps", "churn"),
    [(1, Churn(0.3)), (9, Churn(1.5)), (9, Churn(40.0, noise=1.003)), (18, Churn(40.0, 0.05, 50.0, 1.007))],
)
def test_the_stochastic_sampler_is_algorithm_2(steps, churn):
    x_T, asked = normals(2, 1, 4, 4), []

    def draw(i):
        asked.append(i)
        return normals(2, 1, 4, 4, seed=7 + i)

    sigmas = process.walk(steps)
    y = x_T * math.hypot(80, SIGMA_DATA)
    y = algorithm_2(y, sigmas, churn.amount, churn.low, churn.high, churn.noise, draw)
    drawn, asked[:] = list(asked), []
    found = sample(bent, process, x_T, "heun", steps, step_noise=draw, churn=churn)
    torch.testing.assert_close(found, y, rtol=1e-9, atol=1e-9)
    assert asked == drawn == [i for i, s in enumerate(sigmas) if churn.low <= s <= churn.high]


def test_the_last_steps_alone_churn_as_much_as_they_do_in_the_whole_walk():
    churn, seen = Churn(1.5), []

    def watched(x, t):
        seen.append(t[0].item())
        return bent(x, t)

    for last in (None, 4):
        sample(watched, process, normals(2, 1, 4, 4), "heun", 9, step_noise=lambda i: 0.0, churn=churn, last=last)
    whole, part = seen[: 2 * 9 - 1], seen[2 * 9 - 1 :]
    assert part == whole[-len(part) :]
    assert len(part) == 2 * 4 - 1


def test_churn_of_nothing_is_heun_bit_for_bit():
    x_T = normals(2, 1, 4, 4)
    found = heun_churned(bent, process, x_T, process.walk(6), None, Churn(30.0, low=100.0))
    assert torch.equal(found, sample(bent, process, x_T, "heun", 6))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_3m", "unipc"])
def test_samplers_reach_gaussian_data_of_any_deviation_and_the_error_falls_as_their_order(sampler):
    """N(0.3, 0.5²) where the process takes 0.7 for its deviation: x_0 is mean + deviation · place."""
    x_T = torch.tensor([-1.0, 0.0, 1.5]).double().view(3, 1, 1, 1)
    errors = []
    for steps in (40, 160):
        found = sample(exact(process), process, x_T, sampler, steps)
        scale = math.hypot(80, SIGMA_DATA) / math.hypot(80, 0.5)  # x_T in deviations of y at σ_max
        errors.append(float((found - (0.3 + 0.5 * (scale * x_T - 0.3 / math.hypot(80, 0.5)))).abs().max()))
    assert errors[0] / errors[1] > (3 if sampler == "euler" else 9)
    assert errors[1] < 0.02


def test_a_picture_comes_back_the_closer_the_more_steps():
    x_0, errors = 0.3 + 0.5 * normals(4, 1, 2, 2), []
    for steps in (50, 100, 200):
        x_T = encode(exact(process), process, x_0, process.walk(steps))
        errors.append(float((sample(exact(process), process, x_T, "ddim", steps) - x_0).abs().max()))
    np.testing.assert_allclose(np.array(errors[1:]) / errors[:-1], 0.5, atol=0.1)


def test_the_configured_process():
    section = Section(process="edm", sigma_data=1.0, sigma_max=50.0, rho=5.0, noise_mean=-0.4, noise_std=1.0)
    objective = objectives.denoising(section)
    found = objective.process
    assert (found.sigma_data, found.sigma_min, found.sigma_max, found.rho) == (1.0, 0.002, 50.0, 5.0)
    assert (found.noise_mean, found.noise_std) == (-0.4, 1.0)
    assert found.walk(3)[0] == build(section).walk(1)[0] == 50.0
    u = torch.tensor([0.3, 0.8]).double()
    assert torch.equal(objective.place(u), u)  # levels are eighths of u
