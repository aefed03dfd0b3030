"""A flow's single step with a perceptual distance: the loss and its gradient against LPIPS of torchmetrics."""

import pytest
import torch
from torch import nn

from dtrain.config.perceptual import LPIPS
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.objectives.denoising import Denoising
from dtrain.objectives.one_step import PerceptualOneStep
from dtrain.position import Position
from tests.objectives.perceptual import torchmetrics_own

WEIGHT = 0.7


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        assert torch.equal(t, torch.full((len(x),), 1000.0))
        return self.layer(x)


def batch():
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1
    return {"x_0": x_0, "noise": torch.randn(3, 3, 16, 16, generator=generator), "time": torch.rand(3).double()}


def taken(file, network, weight, prediction="velocity"):
    flow = RectifiedFlow(prediction=prediction)
    objective = PerceptualOneStep(flow, LPIPS(kind="lpips", file=str(file), weight=weight))
    objective.open(torch.device("cpu"))
    losses = objective.losses("main", {"backbone": network}, batch(), {}, Position())
    (gradient,) = torch.autograd.grad(losses.rows.mean(), network.layer.weight)
    return losses, gradient


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_the_distance_of_the_picture_that_one_step_draws_joins_the_squared_error(
    file, features, monkeypatch, prediction
):
    torch.manual_seed(2)
    network, given = Velocity(), batch()
    losses, gradient = taken(file, network, WEIGHT, prediction)
    theirs = torchmetrics_own(features, monkeypatch)
    answer = network.layer(given["noise"])
    drawn = answer if prediction == "x0" else given["noise"] - answer
    squared, distance = (drawn - given["x_0"]).square().flatten(1).mean(1), theirs(drawn, given["x_0"]).flatten()
    torch.testing.assert_close(losses.rows, squared + WEIGHT * distance, rtol=1e-4, atol=1e-6)
    (expected,) = torch.autograd.grad((squared + WEIGHT * distance).mean(), network.layer.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    total, count = losses.parts["perceptual"]
    torch.testing.assert_close(total / count, distance.mean().detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.by_level, squared.detach())


def test_without_weight_it_is_the_loss_of_denoising_and_with_it_another(file):
    torch.manual_seed(2)
    network, given = Velocity(), batch()
    losses, gradient = taken(file, network, 0.0)
    one = torch.ones(3, dtype=torch.float64)
    plain = Denoising(RectifiedFlow()).losses_at(network, given["x_0"], given["noise"], one, {})
    assert torch.equal(losses.rows, plain)
    _, moved = taken(file, network, WEIGHT)
    assert (moved - gradient).norm() > 1e-2 * gradient.norm()
