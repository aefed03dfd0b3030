"""The losses of a denoising GAN: the penalty by finite differences, and whom each turn moves."""

import pytest
import torch

from dtrain.config.diffusion import DenoisingGAN as Section
from dtrain.config.training import Optim
from dtrain.diffusion import process
from dtrain.models.layers import initialize
from dtrain.objectives.denoising_gan import AgainstCritic
from dtrain.position import Position

ROWS, CLASSES, LATENT = 6, 3, 5


def section(**keys):
    return Section(process="ddgan", latent=LATENT, critic={"width": 4}, **keys)


class Generator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(64 + 1 + LATENT + CLASSES, 64, dtype=torch.float64)

    def forward(self, x, told, y):
        seen = torch.cat([x.flatten(1), told.double(), torch.nn.functional.one_hot(y, CLASSES)], dim=1)
        return torch.tanh(self.mix(seen)).view(x.shape)


def made(**keys):
    """(objective, its networks in float64, a batch of rows, what they are told)."""
    config = section(**keys)
    objective = AgainstCritic(process.build(config), config, (1, 8, 8), CLASSES, Optim())
    critic = objective.networks["critic"]()
    initialize(critic, 1)
    torch.manual_seed(0)
    pictures = [torch.randn(ROWS, 1, 8, 8, dtype=torch.float64) for _ in range(4)]
    batch = dict(zip(("x_0", "noise", "step_noise", "reverse_noise"), pictures, strict=True))
    batch |= {"latent": torch.randn(ROWS, LATENT), "time": torch.rand(ROWS, dtype=torch.float64)}
    return objective, {"backbone": Generator(), "critic": critic.double()}, batch, {"y": torch.arange(ROWS) % CLASSES}


def slope_by_differences(critic, x, *told):
    """‖∇D‖² of each row, (N,), by a central difference in each pixel."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for place in range(x[0].numel()):
        aside = torch.zeros_like(x).flatten(1)
        aside[:, place] = 1e-6
        ahead, behind = (critic(x + sign * aside.view(x.shape), *told).double() for sign in (1, -1))
        total += ((ahead - behind) / 2e-6).square()
    return total


class Double(torch.nn.Module):
    """Scores in float64, which the critic's own float32 answers would round."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, *args):
        h = []
        hook = self.critic.last.register_forward_hook(lambda _, given, answer: h.append((given[0], answer)))
        self.critic(*args)
        hook.remove()
        ((features, score),) = h
        return score[:, 0] + (self.critic.y_embedder(args[3]) * features).sum(1)


@pytest.mark.parametrize("timesteps", [1, 4])
def test_the_penalty_is_the_squared_slope_of_the_critic_at_data(timesteps):
    objective, networks, batch, condition = made(timesteps=timesteps, r1=0.7, r1_every=3)
    networks["critic"] = critic = Double(networks["critic"])
    with_it, without = (objective.losses("critic", networks, batch, condition, Position(n, 0)) for n in (3, 4))
    t = objective.process.time(batch["time"])
    before, x_t = objective.process.pair(batch["x_0"], batch["noise"], batch["step_noise"], t)
    with torch.no_grad():
        squared = slope_by_differences(critic, before, x_t, t, condition["y"])
    assert squared.min() > 1e-4
    torch.testing.assert_close(with_it.rows - without.rows, 0.35 * squared, rtol=1e-5, atol=1e-9)
    value, rows = with_it.parts["r1"]
    assert value.item() == pytest.approx(squared.sum().item(), rel=1e-5)
    assert rows == ROWS
    assert "r1" not in without.parts


def test_losses_are_those_of_scores():
    objective, networks, batch, condition = made(r1=0.0)
    t = objective.process.time(batch["time"])
    before, x_t = objective.process.pair(batch["x_0"], batch["noise"], batch["step_noise"], t)
    told = torch.cat([t[:, None].float(), batch["latent"]], dim=1)
    drawn = objective.process.reverse(networks["backbone"](x_t, told, **condition), x_t, batch["reverse_noise"], t)
    real, fake = (networks["critic"](x, x_t, t, condition["y"]).double() for x in (before, drawn))
    main, critic = (objective.losses(turn, networks, batch, condition, Position()) for turn in ("main", "critic"))
    expected = -torch.log(torch.sigmoid(-fake)) - torch.log(torch.sigmoid(real))
    torch.testing.assert_close(critic.rows.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(main.rows.double(), -torch.log(torch.sigmoid(fake)), rtol=1e-5, atol=1e-6)


def test_each_turn_leaves_the_other_network_without_a_gradient_from_its_own_forward():
    objective, networks, batch, condition = made()
    objective.losses("critic", networks, batch, condition, Position()).rows.sum().backward()
    assert all(p.grad is None for p in networks["backbone"].parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in networks["critic"].parameters())
    objective.losses("main", networks, batch, condition, Position()).rows.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in networks["backbone"].parameters())


def test_a_gan_of_one_step_does_not_look_at_the_noise():
    objective, networks, batch, condition = made(timesteps=1, r1=0.0)
    other = batch | {"noise": batch["noise"] + 1}
    ours, theirs = (objective.losses("critic", networks, one, condition, Position()).rows for one in (batch, other))
    assert torch.equal(ours, theirs)


def test_the_class_counts():
    objective, networks, batch, condition = made(r1=0.0)
    other = {"y": (condition["y"] + 1) % CLASSES}
    for turn in ("main", "critic"):
        ours, theirs = (objective.losses(turn, networks, batch, told, Position()).rows for told in (condition, other))
        assert (ours != theirs).all()


@pytest.mark.parametrize("r1", [0.0, 0.5])
def test_only_with_the_penalty_is_a_gradient_differentiated(r1):
    objective, *_ = made(r1=r1)
    assert objective.turns["critic"].differentiates == (r1 > 0)
