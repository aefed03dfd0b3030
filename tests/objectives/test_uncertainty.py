"""The learned uncertainty of a level's loss, against the equation in float64 and against what it is at its least."""

import math

import pytest
import torch

from dtrain.config import EDM as Section
from dtrain.diffusion.times import by_noise_level
from dtrain.models.layers import initialize
from dtrain.models.loss_uncertainty import LossUncertainty
from dtrain.objectives.build import denoising
from dtrain.objectives.denoising import Denoising
from dtrain.objectives.uncertainty import UncertainDenoising
from dtrain.position import Position
from dtrain.training.record.levels import StepLosses
from tests.diffusion.numbers import normal
from tests.objectives.rows import row_losses

N = 64
OBJECTIVE = denoising(Section(process="edm", uncertainty="learned"))


def batch(n=N):
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return {"x_0": normal(n, 1, 2, 2), "noise": normal(n, 1, 2, 2, seed=1), "time": u, "k": torch.arange(n)}


def backbone(x, t):
    return 0.3 * torch.tanh(x) + t.view(-1, 1, 1, 1) / 1000


def losses(network, given):
    return OBJECTIVE.losses("main", {"backbone": backbone, "uncertainty": network}, given, {}, Position())


def plain(given):
    return row_losses(Denoising(OBJECTIVE.process), backbone, given["x_0"], given["noise"], given["time"], {})


def test_a_row_is_its_loss_over_e_to_u_plus_u_and_its_level_shows_the_loss_itself():
    given = batch()
    told = OBJECTIVE.process.model_time(OBJECTIVE.process.time(given["time"]), given["x_0"])
    found = losses(lambda t: 0.002 * t - 0.4, given)
    expected = [
        squared * math.exp(0.4 - 0.002 * t) + 0.002 * t - 0.4
        for squared, t in zip(plain(given).double().tolist(), told.double().tolist(), strict=True)
    ]
    torch.testing.assert_close(found.rows.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
    step = StepLosses(OBJECTIVE, torch.device("cpu"))
    step.add("main", given, found)
    sums, counts = by_noise_level(plain(given), given["time"])
    torch.testing.assert_close(step.by_level(), torch.cat([sums, counts]), rtol=1e-6, atol=0)
    assert float(step.named["mse"][0]) == pytest.approx(float(plain(given).sum()), rel=1e-5)
    assert float(step.named["uncertainty"][0]) == pytest.approx(float((0.002 * told - 0.4).sum()), rel=1e-4)


def test_it_begins_at_0_and_the_losses_as_they_are_without():
    network = LossUncertainty()
    initialize(network, 0)
    given = batch()
    assert torch.equal(losses(network, given).rows, plain(given))


def test_it_learns_the_logarithm_of_each_levels_loss():
    """L = 0.05 + 0.9 place², known exactly; every level then pulls with strength 1."""
    network, given = LossUncertainty(), batch(256)
    initialize(network, 0)
    process = OBJECTIVE.process
    told = process.model_time(process.time(given["time"]), given["x_0"])
    squared = 0.05 + 0.9 * given["time"].float() ** 2
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    for _ in range(600):
        u = network(told)
        optimizer.zero_grad()
        (squared * (-u).exp() + u).mean().backward()
        optimizer.step()
    pull = (squared * (-network(told)).exp()).detach().view(8, -1).mean(1)
    torch.testing.assert_close(pull, torch.ones(8), rtol=0.1, atol=0)


def test_the_config_chooses_it():
    assert type(OBJECTIVE) is UncertainDenoising
    assert OBJECTIVE.turns["main"].networks == ("backbone", "uncertainty")
    assert type(denoising(Section(process="edm"))) is Denoising
