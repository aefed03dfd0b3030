import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dtrain.diffusion.edm import EDM
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.samplers import ddim, network_evaluations, sample
from dtrain.diffusion.schedule import linear, named, subsequence

process = GaussianDiffusion(linear(1000))
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

MEAN, STD = 0.3, 0.5


def normals(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def exact(x, t):
    """E[ε | x_t] for data N(MEAN, STD²)."""
    alpha_bar = ALPHA_BAR[int(t[0])]
    return math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar) * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar)


def bent(x, t):
    """A denoiser that is far from linear."""
    return torch.sin(3 * x) + 0.1 * x.roll(1, -1) + t.view(-1, 1, 1, 1) / 1000


def diffusers_ddim(denoiser, x_T, steps, spacing, eta, step_noise):
    """diffusers' own loop in float64, on our ᾱ (its table is float32); also the timesteps it visits."""
    scheduler = DDIMScheduler(1000, clip_sample=False, timestep_spacing=spacing, set_alpha_to_one=True)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = process.schedule.alpha_bar, torch.tensor(1.0).double()
    scheduler.set_timesteps(steps)
    x = x_T
    for i, t in enumerate(scheduler.timesteps):
        eps = denoiser(x, torch.full((len(x),), int(t)))
        last = i + 1 == steps
        noise = None if eta == 0 else torch.zeros_like(x) if last else step_noise(i)
        x = scheduler.step(eps, int(t), x, eta=eta, variance_noise=noise).prev_sample
    return x, scheduler.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 50, 300, 1000])
def test_ddim_agrees_with_diffusers_for_leading_spacing(steps, eta):
    x_T = normals(2, 3, 4, 4)

    def noise(i):
        return normals(2, 3, 4, 4, seed=1 + i)

    theirs, timesteps = diffusers_ddim(bent, x_T, steps, "leading", eta, noise)
    ours = ddim(bent, process, x_T, timesteps, eta, noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    if 1000 % steps == 0:
        assert subsequence(1000, steps, "leading") == timesteps


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_agrees_with_diffusers_for_trailing_spacing_where_the_steps_divide(eta):
    x_T = normals(2, 1, 4, 4)

    def noise(i):
        return normals(2, 1, 4, 4, seed=1 + i)

    theirs, timesteps = diffusers_ddim(bent, x_T, 50, "trailing", eta, noise)
    assert timesteps == subsequence(1000, 50, "trailing")
    ours = ddim(bent, process, x_T, timesteps, eta, noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_where_trailing_steps_do_not_divide_ours_follows_the_listed_predecessor_and_diffusers_does_not():
    x_T, timesteps = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1), subsequence(1000, 30, "trailing")
    theirs, their_timesteps = diffusers_ddim(exact, x_T, 30, "trailing", 0.0, None)
    assert their_timesteps == timesteps
    ours = ddim(exact, process, x_T, timesteps)
    assert float((ours[1] - ours[0]).item()) == pytest.approx(closed_std(timesteps), abs=1e-10)
    assert abs(float((theirs[1] - theirs[0]).item()) - closed_std(timesteps)) > 1e-3


def closed_std(timesteps, eta=0.0):
    """Standard deviation of x_0 for exact ε: with σ² the step's variance, var_p = c² var_t + σ²."""
    variance = 1.0
    for i, t in enumerate(timesteps):
        p = ALPHA_BAR[timesteps[i + 1]] if i + 1 < len(timesteps) else 1.0
        a = ALPHA_BAR[t]
        added = eta**2 * (1 - p) / (1 - a) * (1 - a / p)
        c = (math.sqrt(a * p) * STD**2 + math.sqrt((1 - p - added) * (1 - a))) / (a * STD**2 + 1 - a)
        variance = c**2 * variance + added
    return math.sqrt(variance)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 10, 50, 333, 1000])
def test_deterministic_ddim_on_gaussian_data_is_the_closed_product(steps, spacing):
    timesteps = subsequence(1000, steps, spacing)
    x_T = torch.tensor([0.0, 1.0, math.sqrt(ALPHA_BAR[timesteps[0]]) * MEAN], dtype=torch.float64).view(3, 1, 1, 1)
    zero, one, mean = ddim(exact, process, x_T, timesteps).flatten().tolist()
    assert one - zero == pytest.approx(closed_std(timesteps), abs=1e-10)  # x_0 is affine in x_T
    assert mean == pytest.approx(MEAN, abs=1e-10)


@pytest.mark.parametrize(("steps", "std"), [(10, 0.37413), (50, 0.47244), (1000, 0.49850)])
def test_deterministic_ddim_reaches_the_known_standard_deviations(steps, std):
    timesteps = subsequence(1000, steps, "leading")
    zero, one = ddim(exact, process, torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1), timesteps).flatten().tolist()
    assert round(one - zero, 5) == std


@pytest.mark.parametrize(("steps", "eta"), [(10, 0.5), (50, 0.2), (50, 1.0), (1000, 1.0)])
def test_stochastic_ddim_on_gaussian_data_has_the_closed_standard_deviation(steps, eta):
    """Without sampling error: x_0 is affine in the noises, so each row gets a unit of one of them."""
    timesteps = subsequence(1000, steps, "leading")
    unit = torch.eye(steps + 1, dtype=torch.float64)  # row j: unit of noise j; the last row none; noise S − 1 is x_T
    x_T = unit[:, steps - 1].view(-1, 1, 1, 1)
    response = ddim(exact, process, x_T, timesteps, eta, lambda i: unit[:, i].view(-1, 1, 1, 1)).flatten()
    std = (response[:-1] - response[-1]).square().sum().sqrt()
    assert float(std) == pytest.approx(closed_std(timesteps, eta), abs=1e-10)
    if (steps, eta) == (1000, 1.0):
        assert round(float(std), 5) == 0.49611


def test_the_last_step_draws_no_noise_and_the_others_each_draw_once():
    asked = []

    def noise(i):
        asked.append(i)
        return torch.ones(1, 1, 2, 2)

    ddim(bent, process, torch.zeros(1, 1, 2, 2), [900, 500, 20], 1.0, noise)
    assert asked == [0, 1]
    ddim(bent, process, torch.zeros(1, 1, 2, 2), [900, 500, 20], 0.0, noise)
    assert asked == [0, 1]


def test_a_float32_state_stays_float32_and_stays_near_float64():
    x_T, timesteps = normals(2, 1, 4, 4), subsequence(1000, 20, "trailing")
    single = ddim(exact, process, x_T.float(), timesteps)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), ddim(exact, process, x_T, timesteps), rtol=0, atol=1e-5)


def test_eta_without_noise_or_beyond_what_a_step_holds_is_refused():
    with pytest.raises(ValueError, match="step_noise"):
        ddim(bent, process, torch.zeros(1, 1, 2, 2), [500, 0], 0.5)
    with pytest.raises(ValueError, match="at most 1"):
        ddim(bent, process, torch.zeros(1, 1, 2, 2), [500, 0], 5.0, lambda i: torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(
    "sampler",
    [
        "ddim",
        "ancestral",
        "dpmpp_2m",
        "unipc",
        "heun",
        "euler",
        "sde",
        "heun of zero SNR",
        "heun of flow",
        "heun of edm",
        "euler of edm",
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_how_often_a_sampler_asks_the_network_is_known_before(sampler, steps):
    sampler, _, of = sampler.partition(" of ")
    walked = process
    if of == "zero SNR":
        walked = GaussianDiffusion(named("linear", 1000, zero_terminal_snr=True), prediction="velocity")
    elif of == "edm":
        walked = EDM()
    elif of == "flow" or sampler in ("euler", "sde"):
        walked = RectifiedFlow()
    asked = []

    def denoiser(x, t):
        asked.append(t)
        return x

    sample(denoiser, walked, normals(1, 1, 2, 2), sampler, steps, step_noise=lambda i: normals(1, 1, 2, 2))
    assert network_evaluations(walked, sampler, steps) == len(asked)
