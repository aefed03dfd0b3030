"""A denoising GAN's two networks: samples that differ from the start, and a critic that judges each row by itself."""

import pytest
import torch

from dtrain.config import load
from dtrain.models.build import build
from dtrain.models.layers import initialize
from dtrain.models.step_critic import StepCritic
from tests.digits import CONFIG

MODELS = {
    "dit": "{name: dit, depth: 2, width: 32, heads: 2, patch: 2}",
    "unet": "{name: unet, width: 8, multipliers: [1, 2], attention: []}",
}


@pytest.mark.parametrize("name", MODELS)
def test_other_numbers_give_other_samples_from_the_start(name):
    """A network that began as 0 would be pulled as one, all samples the same way."""
    overrides = [f"model={MODELS[name]}", "diffusion={process: ddgan, latent: 9}", "eval={}"]
    network, z = build(load(CONFIG, overrides)), torch.randn(64, 9)
    drawn = network(torch.zeros(64, 1, 8, 8), torch.cat([torch.ones(64, 1), z], dim=1))
    assert drawn.std(dim=0).mean() > 0.1


@pytest.mark.parametrize(("side", "alone"), [(8, False), (8, True), (32, False), (12, False), (4, False)])
def test_the_critic_judges_each_row_by_itself(side, alone):
    critic = StepCritic(side, 2, 8, 3, alone)
    initialize(critic, 0)
    x, x_t = torch.randn(2, 6, 2, side, side)
    t, y = torch.arange(6) % 4, torch.arange(6) % 3
    together = critic(x, x_t, t, y)
    assert together.shape == (6,)
    alone_each = torch.cat([critic(*(one[i : i + 1] for one in (x, x_t, t, y))) for i in range(6)])
    torch.testing.assert_close(together, alone_each, rtol=1e-5, atol=1e-6)
    seen = [
        critic(x, x_t + 1, t, y),
        critic(x, x_t, t + 1, y),
        critic(x, x_t, t, (y + 1) % 3),
        critic(x + 1, x_t, t, y),
    ]
    assert [torch.equal(one, together) for one in seen] == [alone, False, False, False]
