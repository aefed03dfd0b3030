"""Every term of an autoencoder's loss moves the weights, and as its own gradient says."""

import pytest
import torch

from dtrain.config import Optim
from dtrain.config.autoencoding import Autoencoding as Section
from dtrain.models.kl_autoencoder import KLAutoencoder
from dtrain.models.layers import initialize
from dtrain.models.patch_critic import PatchCritic
from dtrain.objectives.autoencoding import Autoencoding
from dtrain.position import Position

WIDTH, N, SIDE = 8, 2, 32
CRITIC = {"width": 8, "layers": 1, "weight": 0.5}


@pytest.fixture
def networks():
    model, critic = KLAutoencoder(3, [WIDTH, 16], 1, 2), PatchCritic(3, 8, 1)
    initialize(model, 0)
    initialize(critic, 1)
    return {"backbone": model, "critic": critic}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(N, 3, SIDE, SIDE, generator=generator) * 2 - 1
    return {"x_0": x, "posterior": torch.randn(N, 2, SIDE // 2, SIDE // 2, generator=generator)}


def flat(value, network):
    grads = torch.autograd.grad(value, list(network.parameters()), materialize_grads=True, allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads])


def gradient(networks, batch, turn="main", ratio=None, **keys):
    """Of the mean loss, at every weight of the turn's network, as one vector."""
    objective = Autoencoding(Section(kind="autoencoding", **keys), 3, WIDTH, Optim())
    objective.open(torch.device("cpu"))
    if ratio is not None:
        objective.load_state({"critic_ratio": torch.tensor([ratio])})
    network = networks["backbone" if turn == "main" else "critic"]
    losses = objective.losses(turn, networks, batch, {}, Position(5, 0))
    return flat(losses.rows.mean(), network)


def own(networks, batch, term):
    """Gradient of a term by itself, by autograd through all of the autoencoder."""
    model = networks["backbone"]
    return flat(term(model(batch["x_0"], batch["posterior"])).mean(), model)


def assert_is(moved, expected):
    assert expected.norm() > 0
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("l2", 2)])
def test_the_error_of_the_picture_moves_the_weights(networks, batch, kind, power):
    found = gradient(networks, batch, reconstruction=kind, kl_weight=0)
    assert_is(found, own(networks, batch, lambda out: (out.pixels - batch["x_0"]).abs() ** power))


def test_the_divergence_moves_the_weights(networks, batch):
    found = gradient(networks, batch, kl_weight=2.0) - gradient(networks, batch, kl_weight=0)

    def kl(out):
        posterior = torch.distributions.Normal(out.mean, (out.log_variance / 2).exp())
        prior = torch.distributions.Normal(0.0, 1.0)
        return 2 * torch.distributions.kl_divergence(posterior, prior).flatten(1).sum(1) / batch["x_0"][0].numel()

    assert_is(found, own(networks, batch, kl))


def test_the_perceptual_distance_moves_the_weights(networks, batch):
    from dtrain.config.perceptual import EfficientNetLite0
    from dtrain.objectives.perceptual import build

    keys = {"kind": "effnet_lite0", "weight": 3.0}
    found = gradient(networks, batch, perceptual=keys) - gradient(networks, batch)
    distance = build(EfficientNetLite0(**keys), torch.device("cpu"))
    assert_is(found, own(networks, batch, lambda out: 3 * distance(out.pixels, batch["x_0"])))


def test_the_judgement_of_the_critic_moves_the_weights_by_as_much_as_its_weight_says(networks, batch):
    found = gradient(networks, batch, critic=CRITIC, ratio=2.0) - gradient(networks, batch, critic=CRITIC, ratio=0.0)
    assert_is(found, own(networks, batch, lambda out: -(0.5 * 2.0) * networks["critic"](out.pixels)))
    before = gradient(networks, batch, critic=CRITIC | {"from_step": 6}, ratio=2.0)
    assert torch.equal(before, gradient(networks, batch))


def test_the_hinge_loss_moves_the_critic(networks, batch):
    found = gradient(networks, batch, turn="critic", critic=CRITIC)
    critic, x = networks["critic"], batch["x_0"]
    pixels = networks["backbone"](x, batch["posterior"]).pixels.detach()
    hinge = 0.5 * ((1 - critic(x)).clamp(min=0) + (1 + critic(pixels)).clamp(min=0)).mean()
    assert_is(found, flat(hinge, critic))
