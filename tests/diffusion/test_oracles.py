"""Every sampler against diffusers' own loop, in float64, where that one is right; and where it is known to be wrong."""

import math

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.samplers import ancestral, ddim, encode, sample
from dtrain.diffusion.schedule import cosine, linear, scaled_linear, subsequence, with_zero_terminal_snr
from dtrain.diffusion.solvers import dpmpp_2m, heun, heun_flow, unipc
from tests.diffusion.gaussian_data import normals
from tests.diffusion.theirs import InFloat64, bent

SCHEDULE = linear(1000)
THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SHAPE = (2, 1, 4, 4)


def wide(x, t):
    """The same with variance channels."""
    return torch.cat([bent(x, t), torch.cos(2 * x)], dim=1)


def on_our_table(scheduler):
    """diffusers computes its tables in float32; give it ours."""
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar
    scheduler.betas, scheduler.alphas = SCHEDULE.beta, 1 - SCHEDULE.beta
    scheduler.one = torch.tensor(1.0).double()
    return scheduler


class Normals:
    """Stands in for diffusers' source of noise, which it asks once a step but never on the last."""

    def __init__(self):
        self.step = 0

    def __call__(self, *args, **kwargs):
        self.step += 1
        return step_noise(self.step - 1)


def step_noise(i):
    return normals(*SHAPE, seed=100 + i)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("steps", [10, 40, 1000])
def test_ancestral_is_theirs(monkeypatch, steps, variance, prediction):
    if steps == 1000 and prediction != "eps":
        steps = 125
    scheduler = on_our_table(
        DDPMScheduler(1000, variance_type=variance, clip_sample=False, prediction_type=THEIR_PREDICTION[prediction])
    )
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", Normals())
    scheduler.set_timesteps(steps)
    net = wide if variance == "learned_range" else bent
    x = x_T = normals(*SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.expand(2)), t, x).prev_sample
    ours = GaussianDiffusion(SCHEDULE, prediction, variance)
    found = ancestral(net, ours, x_T, scheduler.timesteps.tolist(), step_noise)
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


def test_ancestral_clips_as_they_do(monkeypatch):
    scheduler = on_our_table(DDPMScheduler(1000, clip_sample=True))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", Normals())
    scheduler.set_timesteps(20)
    x = x_T = normals(*SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(bent(x, t.expand(2)), t, x).prev_sample
    found = ancestral(bent, GaussianDiffusion(SCHEDULE), x_T, scheduler.timesteps.tolist(), step_noise, clip=True)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-10)


def their_ddim(steps, prediction="eps", clip=False, rederive=False, spacing="leading"):
    scheduler = on_our_table(
        DDIMScheduler(1000, clip_sample=clip, prediction_type=THEIR_PREDICTION[prediction], timestep_spacing=spacing)
    )
    scheduler.final_alpha_cumprod = scheduler.one
    scheduler.set_timesteps(steps)
    x = normals(*SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(bent(x, t.expand(2)), int(t), x, use_clipped_model_output=rederive).prev_sample
    return x, scheduler.timesteps.tolist()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ddim_is_theirs_for_every_prediction(prediction):
    theirs, timesteps = their_ddim(25, prediction)
    ours = ddim(bent, GaussianDiffusion(SCHEDULE, prediction), normals(*SHAPE), timesteps)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_a_clipped_estimate_brings_its_own_eps_unlike_their_default():
    theirs, timesteps = their_ddim(25, clip=True, rederive=True)
    default, _ = their_ddim(25, clip=True)
    ours = ddim(bent, GaussianDiffusion(SCHEDULE), normals(*SHAPE), timesteps, clip=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert float((ours - default).abs().max()) > 1e-2


def by_hand(timesteps):
    """DDIM with the listed predecessor, scalar by scalar."""
    x = normals(*SHAPE)
    for t, p in zip(timesteps, [*timesteps[1:], -1], strict=True):
        a, b = (1.0 if i == -1 else float(SCHEDULE.alpha_bar[i]) for i in (t, p))
        eps = bent(x, torch.tensor([t, t]))
        x = math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps
    return x


@pytest.mark.parametrize(
    ("spacing", "steps", "right"),
    [
        ("leading", 30, True),
        ("leading", 50, True),
        ("trailing", 50, True),
        ("trailing", 30, False),
        ("trailing", 7, False),
        ("linspace", 50, False),
        ("linspace", 10, False),
        ("linspace", 1000, True),
    ],
)
def test_ours_goes_to_the_listed_predecessor_and_theirs_only_where_the_gaps_are_equal(spacing, steps, right):
    theirs, timesteps = their_ddim(steps, spacing=spacing)
    ours = ddim(bent, GaussianDiffusion(SCHEDULE), normals(*SHAPE), timesteps)
    torch.testing.assert_close(ours, by_hand(timesteps), rtol=0, atol=1e-10)
    if right:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    else:
        assert float((ours - theirs).abs().max()) > 1e-4


def test_theirs_takes_a_step_too_many_for_some_trailing_spacings_and_never_reaches_the_top_with_some_leading_ones():
    scheduler = DDIMScheduler(1000, timestep_spacing="trailing")
    too_many = []
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        too_many += [steps] * (len(scheduler.timesteps) != steps)
        assert len(subsequence(1000, steps, "trailing")) == steps
    assert too_many
    scheduler = DDIMScheduler(1000, timestep_spacing="leading")
    scheduler.set_timesteps(600)
    assert int(scheduler.timesteps[0]) == 599
    assert subsequence(1000, 600, "leading")[0] == 998


@pytest.mark.parametrize("steps", [2, 10, 50, 200])
def test_linspace_visits_what_theirs_does(steps):
    scheduler = DDIMScheduler(1000, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    assert subsequence(1000, steps, "linspace") == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_inversion_is_theirs(steps):
    scheduler = on_our_table(DDIMInverseScheduler(1000, clip_sample=False, timestep_spacing="trailing"))
    scheduler.initial_alpha_cumprod = scheduler.one
    scheduler.set_timesteps(steps)
    x = x_0 = normals(*SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(bent(x, t.expand(2)), int(t), x).prev_sample
    timesteps = scheduler.timesteps.tolist()[::-1]
    assert timesteps == subsequence(1000, steps, "trailing")
    torch.testing.assert_close(encode(bent, GaussianDiffusion(SCHEDULE), x_0, timesteps), x, rtol=1e-10, atol=1e-10)


def float64_sigmas(timesteps):
    """σ/α at the visited timesteps and 0 at the end: theirs are rounded to float32."""
    sigma = (SCHEDULE.sigma / SCHEDULE.alpha)[torch.as_tensor(timesteps).long()]
    return torch.cat([sigma, torch.zeros(1).double()])


def assert_walks_alike(scheduler, solver, prediction, steps):
    """A multistep scheduler of diffusers and one of ours, from the same noise, in float64."""
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    assert timesteps == subsequence(1000, steps, "trailing")
    scheduler.sigmas = float64_sigmas(timesteps)
    x = x_T = normals(*SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(bent(x, t.expand(2)), t, x).prev_sample
    ours = solver(bent, GaussianDiffusion(SCHEDULE, prediction), x_T, timesteps)
    assert x.dtype == torch.float64
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("steps", [1, 2, 10, 25, 100])
def test_dpm_solver_is_theirs(monkeypatch, steps, prediction):
    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.torch", InFloat64())
    scheduler = on_our_table(
        DPMSolverMultistepScheduler(
            1000, algorithm_type="dpmsolver++", solver_type="midpoint", prediction_type=THEIR_PREDICTION[prediction],
            final_sigmas_type="zero", lower_order_final=True, timestep_spacing="trailing",
        )
    )  # fmt: skip
    assert_walks_alike(scheduler, dpmpp_2m, prediction, steps)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 100])
def test_unipc_is_theirs(steps, prediction):
    scheduler = on_our_table(
        UniPCMultistepScheduler(
            1000, solver_order=2, solver_type="bh2", prediction_type=THEIR_PREDICTION[prediction],
            final_sigmas_type="zero", lower_order_final=True, timestep_spacing="trailing",
        )
    )  # fmt: skip
    assert_walks_alike(scheduler, unipc, prediction, steps)


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_heun_is_theirs(steps):
    scheduler = on_our_table(HeunDiscreteScheduler(1000, timestep_spacing="trailing"))
    scheduler.set_timesteps(steps)
    timesteps = subsequence(1000, steps, "trailing")
    sigmas = float64_sigmas(timesteps)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    x_T = normals(*SHAPE)
    x = x_T * (1 + sigmas[0] ** 2).sqrt()  # their state is x/α
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(bent(scaled, t.expand(2)), t, x).prev_sample
    ours = heun(bent, GaussianDiffusion(SCHEDULE), x_T, timesteps)
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_flow_euler_is_theirs(monkeypatch, steps):
    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_euler_discrete.torch", InFloat64())
    process = RectifiedFlow()
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(sigmas=process.walk(steps))
    x = x_T = normals(*SHAPE)
    scheduler.sigmas = torch.tensor([*process.walk(steps), 0.0]).double()  # theirs are rounded to float32
    for t in scheduler.timesteps:
        x = scheduler.step(bent(x, t.expand(2)), t, x).prev_sample
    ours = sample(bent, process, x_T, "euler", steps)
    assert x.dtype == torch.float64
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_flow_heun_is_theirs(monkeypatch, steps):
    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_heun_discrete.torch", InFloat64())
    process = RectifiedFlow()
    scheduler = FlowMatchHeunDiscreteScheduler(1000)
    scheduler.set_timesteps(steps)
    sigmas = torch.tensor([*process.walk(steps), 0.0]).double()
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    timesteps = 1000 * scheduler.sigmas[:-1]
    x = x_T = normals(*SHAPE)
    scheduler.set_begin_index(0)
    for t in timesteps:
        x = scheduler.step(bent(x, t.expand(2)), t, x).prev_sample
    ours = heun_flow(bent, process, x_T, process.walk(steps))
    assert x.dtype == torch.float64
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("T", [100, 1000])
def test_scaled_linear_and_cosine_are_theirs(T):
    if T == 1000:
        theirs = DDIMScheduler(T, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
        torch.testing.assert_close(scaled_linear(T).alpha_bar, theirs.double(), rtol=1e-3, atol=0)
    theirs = DDIMScheduler(T, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(cosine(T).alpha_bar, theirs.double(), rtol=2e-3, atol=0)


def test_zero_terminal_snr_is_theirs():
    theirs = (1 - rescale_zero_terminal_snr(SCHEDULE.beta)).cumprod(0)
    torch.testing.assert_close(with_zero_terminal_snr(SCHEDULE).alpha_bar, theirs, rtol=1e-9, atol=1e-14)
