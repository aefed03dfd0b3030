"""EDM's steps for other processes: their σ/α against the formula, diffusers' timesteps, and walks on Gaussian data."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from dtrain.config import SAMPLERS
from dtrain.diffusion.edm import EDM
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.mean_flow import MeanFlow
from dtrain.diffusion.samplers import encode, network_evaluations, sample, times
from dtrain.diffusion.schedule import (
    Schedule,
    cosine,
    edm_subsequence,
    linear,
    scaled_linear,
    sigmoid,
    with_zero_terminal_snr,
)
from dtrain.diffusion.variational import VariationalDiffusion
from dtrain.errors import UserError
from dtrain.objectives.variational import beginning
from tests.diffusion.gaussian_data import STD, affine_std, exact, normals

CHAIN, FLOW = GaussianDiffusion(linear(1000)), RectifiedFlow()
NO_SIGNAL = with_zero_terminal_snr(linear(1000))
SCHEDULES = {"linear": linear(1000), "scaled": scaled_linear(1000), "cosine": cosine(1000), "sigmoid": sigmoid(1000)}


CURVES = {
    "linear": VariationalDiffusion(),
    "cubic": VariationalDiffusion(curve=lambda t: (0.3 * t + 0.7 * t**3, 0.3 + 2.1 * t**2)),
    "learned": VariationalDiffusion(curve=beginning()),
}


def formula(i, steps, high, low):
    """Equation 5 of Karras et al. 2022 with ρ = 7, one at a time."""
    return (high ** (1 / 7) + i / (steps - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def ratio(process, t):
    alpha, sigma = process.level(t)
    return sigma / alpha


# -- a chain of timesteps ---------------------------------------------------------------------------------------------


@given(st.integers(1, 1500), st.floats(0, 1), st.sampled_from([linear, cosine, sigmoid]), st.booleans())
def test_a_chain_has_exactly_s_different_falling_timesteps_between_its_own_ends(T, share, named, ends_in_noise):
    S = max(1, round(share * T))
    if named is linear and T < 21:
        named = cosine
    schedule = with_zero_terminal_snr(named(T)) if ends_in_noise and T > 1 else named(T)
    found = edm_subsequence(schedule, S)
    assert len(found) == S
    assert found[0] == T - 1
    assert found[-1] == 0 or S == 1
    assert all(p < t for t, p in pairwise(found))


@pytest.mark.parametrize("steps", [2, 5, 10])
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_timestep_is_the_nearest_in_log_sigma_to_the_formula_while_none_meet(name, steps):
    schedule = SCHEDULES[name]
    logs = [math.log(1 / a - 1) / 2 for a in schedule.alpha_bar.tolist()]
    wanted = [formula(i, steps, min(160, math.exp(logs[-1])), math.exp(logs[0])) for i in range(1, steps)]
    nearest = [999, *(min(range(1000), key=lambda t, w=w: abs(logs[t] - math.log(w))) for w in wanted)]
    assert len(set(nearest)) == steps
    assert edm_subsequence(schedule, steps) == nearest


@pytest.mark.parametrize("steps", [2, 5, 10, 18, 25, 40, 100, 400])
@pytest.mark.parametrize("name", ["linear", "scaled"])
def test_they_are_diffusers_timesteps_and_where_theirs_meet_ours_move_apart(name, steps):
    schedule = SCHEDULES[name]
    scheduler = DPMSolverMultistepScheduler(1000, use_karras_sigmas=True)
    scheduler.alphas_cumprod = schedule.alpha_bar
    scheduler.set_timesteps(steps)
    theirs, ours = scheduler.timesteps.tolist(), edm_subsequence(schedule, steps)
    assert (len(set(theirs)) == steps) == (steps <= 40)
    moved = list(theirs)
    for i in reversed(range(steps - 1)):  # upwards, each to the next one above the last
        moved[i] = max(moved[i], moved[i + 1] + 1)
    assert (moved == theirs) == (steps <= 40)
    assert max(moved) == 999
    assert ours == moved


def test_where_no_timestep_is_free_above_the_cleaner_ones_move_down():
    ratios = [0.01, 0.02, 0.03, 0.04, 20.0, 150.0]
    schedule = Schedule(1 / (1 + torch.tensor(ratios, dtype=torch.float64) ** 2))
    wanted = [formula(i, 5, ratios[-1], ratios[0]) for i in range(5)]
    assert [min(range(6), key=lambda t, w=w: abs(math.log(ratios[t] / w))) for w in wanted] == [5, 4, 4, 3, 0]
    assert edm_subsequence(schedule, 5) == [5, 4, 3, 2, 0]
    assert edm_subsequence(schedule, 6) == [5, 4, 3, 2, 1, 0]
    with pytest.raises(UserError, match="take 1 to 6"):
        edm_subsequence(schedule, 7)


def test_a_chain_that_ends_without_signal_goes_on_as_if_it_ended_at_160():
    found = edm_subsequence(NO_SIGNAL, 12)
    ratios = (NO_SIGNAL.sigma / NO_SIGNAL.alpha).tolist()
    assert ratios[-1] == math.inf
    wanted = [formula(i, 12, 160, ratios[0]) for i in range(1, 12)]
    assert found == [999, *(min(range(999), key=lambda t, w=w: abs(math.log(ratios[t] / w))) for w in wanted)]


# -- processes of all times -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [FLOW, MeanFlow()])
@pytest.mark.parametrize("steps", [2, 3, 18, 100])
def test_a_flow_begins_at_noise_and_has_the_sigmas_of_edm_from_there(process, steps):
    first, *others = process.walk(steps, "edm")
    assert first == 1
    assert [t / (1 - t) for t in others] == pytest.approx(EDM().walk(steps)[1:], rel=1e-12)
    assert process.walk(1, "edm") == [1.0]


@pytest.mark.parametrize("chain", [None, 10])
@pytest.mark.parametrize("steps", [2, 3, 18, 100])
@pytest.mark.parametrize("name", CURVES)
def test_variational_diffusion_has_these_sigmas_exactly_whatever_its_curve(name, steps, chain):
    process = VariationalDiffusion(timesteps=chain, curve=CURVES[name].curve)
    found, last = process.walk(steps, "edm"), 0.0 if chain is None else 1 / chain
    assert (found[0], found[-1]) == (1.0, last)
    high, low = (math.exp(process.gamma(t) / 2) for t in (1.0, last))
    assert [ratio(process, t) for t in found] == pytest.approx(
        [formula(i, steps, high, low) for i in range(steps)], rel=1e-11
    )
    assert process.walk(1, "edm") == [1.0]


# -- walks ------------------------------------------------------------------------------------------------------------

PROCESSES = {
    "gaussian": GaussianDiffusion(NO_SIGNAL, "v"),
    "flow": FLOW,
    "vdm": CURVES["cubic"],
}
WALKS = [
    (name, sampler)
    for sampler, names in SAMPLERS.items()
    for name in names
    if name in PROCESSES and sampler not in ("sde", "lcm")  # which has times of its own; which keeps no deviation
]


@pytest.mark.parametrize(("name", "sampler"), WALKS)
def test_every_sampler_that_walks_given_times_nears_the_datas_deviation_with_more_steps(name, sampler):
    process, off = PROCESSES[name], []
    # The deviation of x_T that the process has at its first time: a vdm's still has signal.
    alpha, sigma = process.level(times(process, sampler, 9, "edm")[0])
    begins = math.hypot(alpha * STD, sigma)
    for steps in (20, 40, 80):
        asked = []

        def counting(x, t, asked=asked):
            asked.append(t)
            return exact(process)(x, t)

        def drawn(x_T, noise, counting=counting, steps=steps):
            return sample(counting, process, begins * x_T, sampler, steps, "edm", step_noise=noise)

        off.append(abs(affine_std(drawn, steps + 1) - STD))
        assert len(asked) == network_evaluations(process, sampler, steps, "edm")
    assert off[-1] < 0.6 * off[0]
    assert off[-1] < (2e-3 if sampler in ("heun", "dpmpp_2m", "dpmpp_3m", "unipc") else 5e-2)


@pytest.mark.parametrize(("process", "sampler"), [(CHAIN, "ddim"), (CHAIN, "dpmpp_2m"), (FLOW, "heun")])
def test_of_narrow_data_few_steps_of_edm_leave_less_error_than_equal_ones(process, sampler):
    """Of N(0, 0.02²) what there is to decide lies at low noise, where equal steps are few."""
    alpha, sigma = process.level(process.walk(1, "trailing")[0])
    narrow = exact(process, 0.0, 0.02)
    x_T = torch.tensor([math.hypot(alpha * 0.02, sigma)]).double().view(1, 1, 1, 1)
    off = {
        spacing: abs(float(sample(narrow, process, x_T, sampler, 18, spacing)) - 0.02)
        for spacing in ("trailing", "edm")
    }
    assert off["edm"] < 0.4 * off["trailing"]


def test_the_way_to_noise_takes_them_too():
    for process in (CHAIN, FLOW):
        x_0, off = 0.4 * normals(5, 1, 2, 2), []
        for steps in (50, 200):
            walk = process.walk(steps, "edm")
            x_T = encode(exact(process), process, x_0, walk)
            sampler = "ddim" if process is CHAIN else "euler"
            off.append(float((sample(exact(process), process, x_T, sampler, steps, "edm") - x_0).abs().max()))
        assert off[1] < 0.5 * off[0]
