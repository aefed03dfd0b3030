"""Waves of a pixel's value beside it."""

import math

import numpy as np
import pytest
import torch

from dtrain.models.build import build
from dtrain.models.fourier import with_waves
from tests.digits import tiny

UNET = "model={name: unet, width: 16, multipliers: [1, 2], res_blocks: 1, attention: [4], fourier: [7, 8]}"


def test_levels_are_whole_periods_and_half_periods_of_the_two_octaves():
    levels = (2 * torch.arange(256).double() / 255 - 1).view(256, 1, 1, 1)
    z, *waves = with_waves(levels, [7, 8]).unbind(1)
    sin_of_two, sin_of_one, cos_of_two, cos_of_one = waves
    torch.testing.assert_close(z, levels[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(sin_of_one, torch.zeros_like(z), rtol=0, atol=1e-9)
    torch.testing.assert_close(cos_of_one, -torch.ones_like(z), rtol=0, atol=1e-9)  # the same at every level
    torch.testing.assert_close(cos_of_two, torch.zeros_like(z), rtol=0, atol=1e-9)
    torch.testing.assert_close(sin_of_two[1:], -sin_of_two[:-1], rtol=0, atol=1e-9)  # odd and even ones
    quarter = with_waves(levels[:-1] + 0.25 * 2 / 255, [8])[:, 1].abs()
    torch.testing.assert_close(quarter, torch.ones_like(quarter), rtol=0, atol=1e-9)  # a quarter of a level off: all


def test_waves_are_of_each_channel_and_are_never_computed_in_half_precision():
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 4))).float()
    found = with_waves(x, [0, 3])
    assert found.shape == (2, 15, 4, 4)
    for octave, first in ((0, 3), (3, 6)):
        phase = 2**octave * math.pi * 255 / 256 * x
        torch.testing.assert_close(found[:, first : first + 3], phase.sin(), rtol=0, atol=1e-5)
        torch.testing.assert_close(found[:, first + 6 : first + 9], phase.cos(), rtol=0, atol=1e-5)
    assert with_waves(x.bfloat16(), [8]).dtype == torch.float32
    assert with_waves(x, []) is x


@pytest.mark.parametrize("more", [["model.fourier=[7, 8]"], [UNET]], ids=["dit", "unet"])
def test_a_backbone_sees_half_a_level_more(digits, tmp_path, more):
    """By weights alone on the waves: what differs by two levels looks the same, what differs by a half does not."""
    model = build(tiny(digits, tmp_path, *more)).eval()
    first = model.x_embedder.proj if hasattr(model, "x_embedder") else model.conv_in
    assert first.weight.shape[1] == 5
    x = torch.zeros(1, 1, 8, 8) - 1 + 2 * 100 / 255
    with torch.no_grad():
        first.weight[:, 0] = 0
        seen = []
        first.register_forward_hook(lambda _, __, out: seen.append(out))
        for levels in (0, 2, 0.5):
            model(x + levels * 2 / 255, torch.tensor([10.0]), torch.tensor([0]))
    assert float((seen[0] - seen[1]).abs().max()) < 1e-3 < float((seen[0] - seen[2]).abs().max())
