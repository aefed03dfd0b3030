"""MeanFlow on Gaussian data in closed form: u = x (1 − σ_r/σ_t)/(t − r), σ_t² = t² + (1 − t)² s²."""

import math

import pytest
import torch
from torch.func import jvp

from dtrain.diffusion.mean_flow import MeanFlow
from dtrain.diffusion.prediction import Partly
from dtrain.diffusion.samplers import network_evaluations, sample
from dtrain.diffusion.times import LogitNormal
from dtrain.objectives.mean_flow import STEP, MeanVelocity
from dtrain.position import Position
from tests.diffusion.gaussian_data import normals

PROCESS, S = MeanFlow(time_scale=1), 0.4  # a scale of 1, so that float32 times are no coarser than they are


def deviation(t):
    return (t**2 + (1 - t) ** 2 * S**2).sqrt()


def velocity(x, t):
    t = t.view(-1, 1, 1, 1)
    return (t - (1 - t) * S**2) / deviation(t) ** 2 * x


def mean_velocity(x, r, t):
    r, t = r.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
    return x * (1 - deviation(r) / deviation(t)) / (t - r)


def network(x, told, **_):
    t, span = told.double().unbind(1)
    near = span.view(-1, 1, 1, 1) < 1e-6
    apart = torch.where(span < 1e-6, 0.5 * t, span)  # never 0, where the velocity is taken instead
    return torch.where(near, velocity(x, t), mean_velocity(x, t - apart, t))


def objective(along="data", power=1.0):
    return MeanVelocity(PROCESS, LogitNormal(-0.4, 1.0), 0.25, along, power)


X, T = normals(200, 1, 2, 2), torch.linspace(0.02, 0.98, 200, dtype=torch.float64)
R = T * torch.linspace(0.0, 0.97, 200, dtype=torch.float64)


def test_the_identity_that_it_learns_from_holds():
    """u = v − (t − r) du/dt, by forward-mode differentiation along (v, 0, 1)."""
    v, one = velocity(X, T), torch.ones_like(T)
    u, change = jvp(lambda x, t: mean_velocity(x, R, t), (X, T), (v, one))
    torch.testing.assert_close(u, v - (T - R).view(-1, 1, 1, 1) * change, rtol=0, atol=1e-12)


def test_the_central_difference_is_the_derivative_and_ends_where_times_do():
    t = torch.tensor([0.3, 0.5, 0.9, 0.999, 1.0], dtype=torch.float64)
    r = torch.tensor([0.1, 0.499, 0.0, 0.5, 0.2], dtype=torch.float64)
    x, v = X[:5], velocity(X[:5], t)
    _, change = jvp(lambda x, t: mean_velocity(x, r, t), (x, t), (v, torch.ones_like(t)))
    expected = (t - r).view(-1, 1, 1, 1) * change
    found = objective()._change(lambda x, told: network(x, told), x, v, t, r, {})
    assert torch.equal(found[1], torch.zeros_like(found[1]))  # the span is less than a step
    other = [0, 2, 3, 4]
    # At the end the difference is one-sided, and so of first order in the step.
    torch.testing.assert_close(found[other][:2], expected[other][:2], rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(found[other][2:], expected[other][2:], rtol=5 * STEP, atol=2 * STEP)


@pytest.mark.parametrize("along", ["data", "network"])
def test_at_the_solution_what_is_left_is_the_noise_of_single_paths(along):
    """The mean of u − (target), over paths through one x_t, is 0: here over x_t too, against x_t itself."""
    n = 60_000
    x_0, noise = S * normals(n, 1, 1, 1, seed=1), normals(n, 1, 1, 1, seed=2)
    t = torch.full((n,), 0.7, dtype=torch.float64)
    r = torch.full((n,), 0.2, dtype=torch.float64)
    x_t, v = PROCESS.noised(x_0, noise, t), noise - x_0
    made = objective(along)
    learned, towards = made._velocities(network, x_t, v, t, {}, Position(0, 0))
    assert torch.equal(learned, v)
    change = made._change(network, x_t, towards, t, r, {})
    rest = (mean_velocity(x_t, r, t) - v + change).flatten()
    slope = float((rest * x_t.flatten()).mean() / x_t.square().mean())
    assert abs(slope) < 0.02
    if along == "network":  # its change has no noise of its own
        exact = (velocity(x_t, t) - mean_velocity(x_t, r, t)).flatten()
        assert (change.flatten() - exact).abs().max() < 2e-3 * float(exact.abs().max())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_steps_draws_the_data_exactly(steps):
    found = sample(network, PROCESS, X, "euler", steps)
    torch.testing.assert_close(found, S * X, rtol=0, atol=1e-12)
    assert network_evaluations(PROCESS, "euler", steps) == steps


def test_rows_are_weighted_by_their_own_squared_error():
    batch = {"x_0": S * normals(50, 1, 2, 2, seed=5), "noise": normals(50, 1, 2, 2, seed=6)}
    batch |= {n: torch.rand(50, generator=torch.Generator().manual_seed(i)).double()
              for i, n in enumerate(("time", "other_time", "span"))}  # fmt: skip

    def found(power):
        return objective(power=power).losses("main", {"backbone": network}, batch, {}, Position(0, 0))

    plain = found(0.0)
    torch.testing.assert_close(plain.rows, 4 * plain.by_level)  # the sum over four pixels
    weighted = found(0.75).rows
    torch.testing.assert_close(weighted, plain.rows / (plain.rows + 1e-3) ** 0.75, rtol=0, atol=1e-12)
    has_span = batch["span"] < 0.25
    one, other = (LogitNormal(-0.4, 1.0).place(batch[name]) for name in ("time", "other_time"))
    assert torch.equal(plain.place, torch.where(has_span, torch.maximum(one, other), one))


def test_what_is_known_of_a_picture_is_walked_to():
    known, anew = 0.3 * normals(200, 1, 2, 2, seed=9), torch.tensor([True, False, True, False]).view(1, 1, 2, 2)
    found = sample(lambda x, told: Partly(network(x, told), known, anew), PROCESS, X, "euler", 4)
    kept = ~anew.expand_as(found)
    torch.testing.assert_close(found[kept], known[kept], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[~kept], S * X[~kept], rtol=0, atol=1e-12)
    assert math.isfinite(float(found.sum()))
