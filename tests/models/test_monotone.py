"""A curve that rises from (0, 0) to (1, 1) for any weights."""

import numpy as np
import pytest
import torch

from dtrain.models.layers import initialize
from dtrain.models.monotone import MonotoneCurve


def curve(scale=0.0, seed=0):
    """With weights drawn far and wide; its own beginning for scale 0."""
    network = MonotoneCurve()
    initialize(network, seed)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.from_numpy(scale * rng.standard_normal(p.shape)))
    return network


@pytest.mark.parametrize("scale", [0.0, 0.5, 10.0, 1e3, 1e6, 1e37])
@pytest.mark.parametrize("seed", range(5))
def test_ends_are_exact_and_nothing_falls_whatever_the_weights(scale, seed):
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    value, slope = curve(scale, seed)(t)
    assert (value[0].item(), value[-1].item()) == (0.0, 1.0)
    assert value.diff().min() >= -1e-15
    assert slope.min() >= 0
    assert value.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_slope_is_the_derivative(scale):
    network = curve(scale)
    t = torch.linspace(0, 1, 101, dtype=torch.float64).requires_grad_()
    value, slope = network(t)
    (derivative,) = torch.autograd.grad(value.sum(), t)
    torch.testing.assert_close(slope, derivative, rtol=1e-10, atol=1e-12)


def test_it_begins_as_nearly_a_straight_line():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    value, slope = curve().requires_grad_(False)(t)
    assert float((value - t).abs().max()) < 0.02
    assert 0.6 < float(slope.min()) <= float(slope.max()) < 1.4


def test_autocast_changes_nothing():
    network, t = curve(1.0), torch.linspace(0, 1, 11, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(t)
    for a, b in zip(found, network(t), strict=True):
        assert torch.equal(a, b)
