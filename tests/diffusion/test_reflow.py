"""Reflow on Gaussian data, all in closed form: a curved first flow, a straight one on its pairs (Liu et al. 2023)."""

import numpy as np
import pytest
import torch

from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.samplers import sample
from dtrain.diffusion.straightness import straightness
from dtrain.diffusion.times import One
from dtrain.objectives.denoising import Denoising
from tests.diffusion.gaussian_data import normals

FLOW, S = RectifiedFlow(), 0.4
X_T = normals(500, 1, 2, 2)


def first(x, t):
    """E[ε − x_0 | x_t] of x_0 ~ N(0, s²), ε independent of it."""
    place = t[0].item() / FLOW.time_scale
    return (place - (1 - place) * S**2) / (place**2 + (1 - place) ** 2 * S**2) * x


def reflowed(x, t):
    """The same of the pairs x_0 = s ε, which the first flow's ODE makes."""
    place = t[0].item() / FLOW.time_scale
    return (1 - S) / (place + (1 - place) * S) * x


def test_one_step_of_the_first_flow_draws_nothing_and_of_the_reflowed_one_the_data():
    torch.testing.assert_close(sample(first, FLOW, X_T, "euler", 1), torch.zeros_like(X_T), rtol=0, atol=1e-12)
    torch.testing.assert_close(sample(reflowed, FLOW, X_T, "euler", 1), S * X_T, rtol=0, atol=1e-12)
    torch.testing.assert_close(sample(reflowed, FLOW, X_T, "euler", 8), S * X_T, rtol=0, atol=1e-12)


def test_the_first_flows_ode_makes_the_pairs():
    many = sample(first, FLOW, X_T, "heun", 400)
    torch.testing.assert_close(many, S * X_T, rtol=0, atol=1e-4 * float(X_T.abs().max()))


def test_straightness_is_the_closed_one_and_nought_after_reflow():
    """∫ σ̇_t² dt − (1 − s)² = 0.17168 for s = 0.4, of unit noise."""
    rows = straightness(first, FLOW, X_T, 4000) / X_T.square().flatten(1).mean(1)
    assert rows.mean() == pytest.approx(0.17168, abs=2e-4)
    assert rows.std() < 1e-12  # each row's is its own noise's square times that
    assert straightness(reflowed, FLOW, X_T, 50).abs().max() < 1e-12


def test_the_reflowed_velocity_is_what_the_loss_on_pairs_is_least_for():
    """At every t the loss of the network on (s ε, ε) is 0, and that of the first flow is not."""
    objective, noise = Denoising(FLOW), normals(64, 1, 2, 2, seed=5)
    for place in (0.05, 0.5, 1.0):
        at = torch.full((64,), place, dtype=torch.float64)
        losses = {
            name: objective.losses_at(lambda x, t, model=model: model(x, t.double()), S * noise, noise, at, {}).mean()
            for name, model in (("first", first), ("reflowed", reflowed))
        }
        assert losses["reflowed"] < 1e-12
        assert losses["first"] > 1e-3 or place == 0.5


def test_the_time_of_a_single_step_is_noise_alone():
    place = One().place(torch.from_numpy(np.random.default_rng(0).random(50)))
    assert torch.equal(place, torch.ones(50, dtype=torch.float64))
    x_0, noise = normals(50, 1, 2, 2), normals(50, 1, 2, 2, seed=1)
    assert torch.equal(FLOW.noised(x_0, noise, FLOW.time(place)), noise)
