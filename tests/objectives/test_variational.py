"""What descends the bound, and what the square of its chain: the backbone and a learned γ."""

import numpy as np
import pytest
import torch

from dtrain.diffusion import variational_bound as bound
from dtrain.diffusion.likelihood import BITS
from dtrain.diffusion.variational import VariationalDiffusion
from dtrain.models.layers import initialize
from dtrain.models.monotone import MonotoneCurve
from dtrain.objectives.variational import VariationalBound
from dtrain.position import Position

ROWS = 6


class Backbone(torch.nn.Module):
    """Depends on x, on the time that it is told, and on a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x, t):
        return torch.tanh(self.scale * x + torch.sin(t / 300).view(-1, 1, 1, 1))


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    levels, noise = rng.integers(0, 256, (ROWS, 1, 3, 3)), rng.standard_normal((ROWS, 1, 3, 3))
    x0 = torch.from_numpy(2 * levels / 255 - 1)
    return {"x_0": x0, "noise": torch.from_numpy(noise), "time": torch.from_numpy(rng.random(ROWS))}


def learned(timesteps=None):
    """(an objective with a learned γ, its networks), in float64; the curve is bent."""
    networks = {"backbone": Backbone(), "schedule": MonotoneCurve()}
    initialize(networks["schedule"], 0)
    rng = np.random.default_rng(1)
    networks["schedule"].double()
    with torch.no_grad():
        for p in networks["schedule"].parameters():
            p.add_(torch.from_numpy(0.7 * rng.standard_normal(p.shape)))
    return VariationalBound(VariationalDiffusion(timesteps=timesteps), 1.0), networks


def chains(objective, networks, batch):
    """The chain of each row, by the definition: no step of the objective's own."""
    with torch.no_grad():
        t = objective.process.time(batch["time"])
        value, slope = networks["schedule"](t)
        gamma = -13.3 + 18.3 * value
        if objective.process.timesteps is None:
            weight = 18.3 * slope
        else:
            before, _ = networks["schedule"](t - 1 / objective.process.timesteps)
            weight = objective.process.timesteps * torch.expm1(18.3 * (value - before))
        alpha, sigma = ((1 / (1 + torch.exp(sign * gamma))).sqrt().view(-1, 1, 1, 1) for sign in (1, -1))
        answer = networks["backbone"](alpha * batch["x_0"] + sigma * batch["noise"], 1000 * value)
        return BITS * 0.5 * weight * (answer - batch["noise"]).square().mean((1, 2, 3))


def gradients(objective, networks, batch):
    """name → gradient of the mean of the objective's rows."""
    losses = objective.losses("main", networks, batch, {}, Position())
    losses.rows.mean().backward()
    return losses, {
        f"{network}.{name}": p.grad for network, module in networks.items() for name, p in module.named_parameters()
    }


@pytest.mark.parametrize("timesteps", [None, 12])
def test_a_learned_schedule_descends_the_square_of_the_chain_in_continuous_time_and_a_chain_itself(timesteps):
    objective, networks = learned(timesteps)
    batch = drawn()
    losses, found = gradients(objective, networks, batch)
    ends = bound.prior(objective.process, batch["x_0"]) + bound.decoder(objective.process, batch["x_0"], batch["noise"])
    torch.testing.assert_close(losses.rows, ends + chains(objective, networks, batch), rtol=1e-10, atol=1e-10)
    for name, gradient in found.items():
        network, _, local = name.partition(".")
        power = 2 if network == "schedule" and timesteps is None else 1
        values = networks[network].get_parameter(local).data.view(-1)
        for i in range(0, len(values), 5):
            at, step = values[i].item(), 1e-6 * max(1.0, abs(values[i].item()))
            sides = []
            for side in (step, -step):
                values[i] = at + side
                sides.append(float((chains(objective, networks, batch) ** power).mean()))
            values[i] = at
            expected = (sides[0] - sides[1]) / (2 * step)
            assert float(gradient.view(-1)[i]) == pytest.approx(expected, rel=2e-5, abs=2e-7), (name, i)


def test_without_a_learned_schedule_there_is_one_network_and_the_straight_line():
    objective = VariationalBound(VariationalDiffusion())
    assert (dict(objective.networks), objective.of_process) == ({}, ())
    assert objective.turns["main"].networks == ("backbone",)
    assert objective.standing_on({}) is objective


def test_a_learned_schedule_stands_for_evaluation_as_its_network_is():
    objective, networks = learned()
    standing = objective.standing_on({"schedule": networks["schedule"]})
    batch = drawn()
    of_training = objective.losses("main", networks, batch, {}, Position()).rows
    of_evaluation = standing.losses_at(networks["backbone"], batch["x_0"], batch["noise"], batch["time"], {})
    torch.testing.assert_close(of_evaluation, of_training, rtol=0, atol=0)
    assert objective.turns["main"].lr_factors == {"schedule": 1.0}
    assert standing.process.level(0.5) != objective.process.level(0.5)


def test_the_estimate_of_the_bound_is_quieter_after_learning_and_its_mean_the_same():
    """Gaussian data and the exact denoiser: γ' goes as 1/E‖ε − ε̂‖², and the closed form of the chain stays."""
    std = 0.4

    def exact(x, t):
        gamma = -13.3 + 18.3 * t / 1000
        alpha, sigma = (torch.sigmoid(one).sqrt().view(-1, 1, 1, 1) for one in (-gamma, gamma))
        return sigma * x / (alpha**2 * std**2 + sigma**2)

    objective, _ = learned()
    schedule = MonotoneCurve()
    initialize(schedule, 0)
    schedule.double()
    rng = np.random.default_rng(3)

    def batch(rows):
        x0, noise = rng.standard_normal((2, rows, 1, 4, 4))
        time = (np.arange(rows) + rng.random(rows)) / rows
        return {"x_0": torch.from_numpy(std * x0), "noise": torch.from_numpy(noise), "time": torch.from_numpy(time)}

    networks = {"backbone": exact, "schedule": schedule}

    def measured():
        one = batch(20_000)
        losses = objective.losses("main", networks, one, {}, Position())
        rows = (losses.rows - bound.decoder(objective.process, one["x_0"], one["noise"])).detach()
        return float(rows.mean()), float(rows.std())

    before = measured()
    optimizer = torch.optim.Adam(schedule.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        objective.losses("main", networks, batch(128), {}, Position()).rows.mean().backward()
        optimizer.step()
    after = measured()
    chain = 0.5 * np.log((std**2 * np.exp(13.3) + 1) / (std**2 * np.exp(-5) + 1)) * BITS
    assert before[0] == pytest.approx(chain, rel=0.02)
    assert after[0] == pytest.approx(chain, rel=0.02)
    assert after[1] < 0.65 * before[1]
