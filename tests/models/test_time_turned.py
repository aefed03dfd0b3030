"""A flow's network by the other way of counting time: data at 1, and the velocity towards data."""

import pytest
import torch
from safetensors.torch import save_file

from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.guidance import guided
from dtrain.diffusion.samplers import sample
from dtrain.errors import UserError
from dtrain.models.layers import initialize
from dtrain.models.published import load_published
from dtrain.models.time_turned import time_turned
from dtrain.models.unet import UNet
from tests.models.small import small


def random_weights(model, seed=0):
    """All of them, those that begin at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def unet():
    model = UNet(8, 3, width=8, multipliers=[1, 2], res_blocks=1, attention=[4], num_classes=5)
    initialize(model, 0)
    return model


def inputs(n=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0.0, 0.125, 0.7, 1.0])[:n].to(dtype), torch.arange(n) % 5


@pytest.mark.parametrize("build", [small, unet, lambda: small(frequency_shift=1), lambda: small(learn_sigma=True)])
def test_the_turned_weights_answer_at_t_what_the_others_answer_at_1_minus_t_with_another_sign(build):
    model, turned = random_weights(build().double()), build().double()
    turned.load_state_dict(time_turned(model.state_dict(), model))
    x, t, y = inputs()
    torch.testing.assert_close(turned(x, t, y), -model(x, 1 - t, y), rtol=0, atol=1e-11)


def test_of_a_network_that_predicts_x0_no_sign_changes():
    model, turned = random_weights(small().double()), small().double()
    turned.load_state_dict(time_turned(model.state_dict(), model, "x0"))
    x, t, y = inputs()
    torch.testing.assert_close(turned(x, t, y), model(x, 1 - t, y), rtol=0, atol=1e-11)


def test_turned_twice_the_weights_are_those_before():
    model = random_weights(small().double())
    twice = time_turned(time_turned(model.state_dict(), model), model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(twice[name], value, rtol=0, atol=1e-14)


@pytest.fixture
def sit(tmp_path):
    """(the network as SiT's program has it, a file of its weights, a model that has loaded the file)."""
    theirs = random_weights(small(learn_sigma=True))
    path = tmp_path / "SiT.safetensors"
    save_file({name: p.detach().clone() for name, p in theirs.named_parameters()}, path)
    return theirs, path, load_published(small(), path, data_at_one="velocity")


def test_a_published_flow_is_loaded_with_its_time_turned_and_without_the_channels_that_nobody_reads(sit):
    theirs, _, ours = sit
    x, t, y = inputs(dtype=torch.float32)
    velocity = theirs(x, 1 - t, y).chunk(2, dim=1)[0]
    torch.testing.assert_close(ours(x, t, y), -velocity, rtol=1e-4, atol=1e-4)


def test_samples_of_a_published_flow_are_those_of_its_own_equation_walked_by_hand(sit):
    """dx/ds = u + (s − 1)(u − u_null) from noise at s = 0 to data at s = 1, in 8 steps of Euler, in float64."""
    theirs, _, ours = sit
    theirs, ours = theirs.double(), ours.double()
    noise, _, y = inputs()
    process, steps, guidance = RectifiedFlow(time_scale=1), 8, 2.5
    null = torch.full_like(y, 5)
    x = noise
    for i in range(steps):
        s = torch.full((len(x),), i / steps, dtype=torch.float64)
        towards, away = (theirs(x, s, label).chunk(2, dim=1)[0] for label in (y, null))
        x = x + (away + guidance * (towards - away)) / steps
    model = guided(ours, guidance, lambda condition: {"y": torch.full_like(condition["y"], 5)})
    drawn = sample(
        lambda x, t: model(x, t.double(), y=y),
        process,
        noise,
        "euler",
        steps,
        "trailing",
        0.0,
        False,
        lambda step: None,
    )
    torch.testing.assert_close(drawn, x, rtol=1e-5, atol=1e-5)  # the loaded weights were float32


def test_without_data_at_one_the_same_file_is_of_another_shape(sit):
    with pytest.raises(UserError, match=r"`final_layer\.linear"):
        load_published(small(), sit[1])
