"""The density of a flow by its ODE, against closed forms: a Gaussian, and a mixture whose Jacobian is not diagonal."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.ode_likelihood import log_density, velocity_and_divergence
from tests.diffusion.gaussian_data import MEAN, STD, exact, normals
from tests.evaluation.exact_mixture import ExactMixture, drawn, log_density_of_mixture

FLOW = RectifiedFlow()


def signs(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], shape))


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
def test_of_gaussian_data_it_is_the_gaussians_own_within_the_tolerance(tolerance):
    """The Jacobian is diagonal, of which random signs give the trace itself."""
    x0 = MEAN + STD * normals(6, 1, 2, 3)
    found = log_density(exact(FLOW), FLOW, x0, [signs(x0.shape)], tolerance)
    true = torch.distributions.Normal(MEAN, STD).log_prob(x0).flatten(1).sum(1)
    off = (found.prior + found.volume - true).abs().max() / 6
    assert off < 10 * tolerance
    assert found.evaluations < 400


def mixture():
    model = ExactMixture(FLOW)
    return lambda x, t: model(x, t, None)


def test_of_a_mixture_it_is_exact_where_the_probes_are_all_signs():
    """Over all of {−1, 1}⁴ the mean of e · J e is the trace, whatever else J holds."""
    points = drawn(20)
    x0 = points.view(-1, 1, 2, 2)
    every = [torch.tensor(s).double().view(1, 1, 2, 2).expand_as(x0) for s in itertools.product((1, -1), repeat=3)
             for s in [(1, *s)]]  # fmt: skip
    found = log_density(mixture(), FLOW, x0, every, 1e-7)
    off = (found.prior + found.volume - log_density_of_mixture(points)).abs()
    assert off.max() < 1e-4


def test_one_probe_is_without_bias_along_the_whole_walk():
    points = drawn(1).repeat(3000, 1)
    x0 = points.view(-1, 1, 2, 2)
    found = log_density(mixture(), FLOW, x0, [signs(x0.shape)], 1e-4)
    total = found.prior + found.volume
    spread = total.std() / math.sqrt(len(total))
    assert total.std() > 0.005  # one probe alone is not the trace
    assert abs(total.mean() - log_density_of_mixture(points[:1])[0]) < 4 * spread + 1e-3


def test_the_walk_is_scipys():
    """An independent adaptive solver on the same right-hand side, of one row."""
    x0 = drawn(1, seed=4).view(1, 1, 2, 2)
    probe = signs(x0.shape)

    def slope(t, state):
        x = torch.from_numpy(state[:4]).view(1, 1, 2, 2)
        velocity, divergence = velocity_and_divergence(mixture(), FLOW, x, t, [probe])
        return np.append(velocity.numpy().ravel(), divergence.item())

    other = solve_ivp(slope, (0, 1), np.append(x0.numpy().ravel(), 0.0), rtol=1e-9, atol=1e-9).y[:, -1]
    found = log_density(mixture(), FLOW, x0, [probe], 1e-8)
    assert found.volume.item() == pytest.approx(other[4], abs=1e-6)
    assert found.prior.item() == pytest.approx(-0.5 * (other[:4] ** 2).sum() - 2 * math.log(2 * math.pi), abs=1e-6)


def test_a_field_that_no_step_can_follow_is_no_number():
    x0 = torch.ones(2, 1, 1, 1).double()
    with pytest.raises(ValueError, match="the walk cannot go on"):
        log_density(lambda x, t: x * float("nan"), FLOW, x0, [signs(x0.shape)])
