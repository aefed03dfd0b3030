import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from dtrain.config import Config
from dtrain.models.build import build
from dtrain.models.layers import initialize
from dtrain.models.unet import AttentionBlock, Level, ResidualBlock, UNet, Upsample

SMALL = {"image_size": 8, "channels": 3, "width": 8, "multipliers": [1, 2], "res_blocks": 2, "attention": [4],
         "num_classes": 5}  # fmt: skip
CIFAR10 = {"image_size": 32, "channels": 3, "width": 128, "multipliers": [1, 2, 2, 2], "res_blocks": 2,
           "attention": [16], "num_classes": 0, "dropout": 0.1}  # fmt: skip


def small(seed=0, **changes):
    model = UNet(**SMALL | changes)
    initialize(model, seed)
    return model


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in module.double().parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module.eval()


def values(*shape, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def arrays(module):
    return {k: v.numpy() for k, v in module.state_dict().items()}


def silu(v):
    return v / (1 + np.exp(-v))


def group_norm(x, w, name, groups):
    grouped = x.reshape(len(x), groups, -1)
    mean, variance = grouped.mean(2, keepdims=True), grouped.var(2, keepdims=True)
    normalised = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    return normalised * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def convolution(x, w, name, stride=1):
    weight = w[f"{name}.weight"]
    k = weight.shape[2]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwij,ocij->nohw", windows, weight) + w[f"{name}.bias"][:, None, None]


def close(ours, expected):
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("out", [8, 12])
def test_a_residual_block_equals_its_equations(scale_shift, out):
    block = randomised(ResidualBlock(8, out, 16, groups=4, scale_shift=scale_shift, dropout=0.5, layer=1))
    x, c, w = values(2, 8, 6, 6), values(2, 16, seed=2), arrays(block)
    h = convolution(silu(group_norm(x.numpy(), w, "norm1", 4)), w, "conv1")
    condition = (silu(c.numpy()) @ w["condition.weight"].T + w["condition.bias"])[:, :, None, None]
    if scale_shift:
        h = group_norm(h, w, "norm2", 4) * (1 + condition[:, :out]) + condition[:, out:]
    else:
        h = group_norm(h + condition, w, "norm2", 4)
    skip = x.numpy() if out == 8 else convolution(x.numpy(), w, "skip")
    close(block(x, c, None), skip + convolution(silu(h), w, "conv2"))


@pytest.mark.parametrize("heads", [1, 2])
def test_an_attention_block_equals_its_equations(heads):
    block = randomised(AttentionBlock(8, heads, groups=4))
    x, w = values(2, 8, 3, 3), arrays(block)
    tokens = group_norm(x.numpy(), w, "norm", 4).reshape(2, 8, 9).transpose(0, 2, 1)
    qkv = (tokens @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).reshape(2, 9, 3, heads, 8 // heads)
    scores = np.einsum("nqhd,nkhd->nhqk", qkv[:, :, 0], qkv[:, :, 1]) / math.sqrt(8 // heads)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("nhqk,nkhd->nqhd", weights, qkv[:, :, 2]).reshape(2, 9, 8)
    projected = mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    close(block(x), x.numpy() + projected.transpose(0, 2, 1).reshape(x.shape))


def test_halving_and_doubling_the_side_equal_their_equations():
    up, x = randomised(Upsample(4)), values(2, 4, 6, 6)
    close(up(x), convolution(x.numpy().repeat(2, axis=2).repeat(2, axis=3), arrays(up), "conv"))
    down = randomised(small()).down[0].resample
    x = values(2, 8, 8, 8)
    w = {f"down.{k}": v for k, v in arrays(down).items()}
    close(down(x), convolution(x.numpy(), w, "down", stride=2))


def test_ddpms_model_for_cifar10_has_its_parameters():
    with torch.device("meta"):
        model = UNet(**CIFAR10)
        theirs = UNet2DModel(
            sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, attention_head_dim=None,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    count = sum(p.numel() for p in model.parameters())
    assert count == 35_746_307  # 35.7 M in Ho et al. 2020, appendix B
    assert count == sum(p.numel() for p in theirs.parameters())
    assert count == counted_by_hand()


@pytest.mark.parametrize(
    ("side", "millions", "sizes"),
    [
        (64, 295.9, {"width": 192, "multipliers": [1, 2, 3, 4], "res_blocks": 3}),
        (128, 421.5, {"width": 256, "multipliers": [1, 1, 2, 3, 4], "res_blocks": 2}),
        (256, 553.8, {"width": 256, "multipliers": [1, 1, 2, 2, 4, 4], "res_blocks": 2}),
    ],
)
def test_adms_models_for_imagenet_have_their_parameters(side, millions, sizes):
    """Dhariwal & Nichol 2021: classes, learned variance, heads of 64 channels; a null label of ours apart."""
    adm = {"attention": [32, 16, 8], "head_width": 64, "scale_shift": True, "learn_sigma": True}
    with torch.device("meta"):
        model = UNet(side, 3, num_classes=1000, resblock_updown=True, group_norm_eps=1e-5, **adm, **sizes)
    count = sum(p.numel() for p in model.parameters()) - 4 * sizes["width"]
    assert round(count / 1e6, 1) == millions


def counted_by_hand():
    """Every layer of Ho et al.'s appendix B, multiplied out."""

    def conv(i, o, k=3):
        return i * o * k * k + o

    def residual(i, o):
        return 2 * i + conv(i, o) + conv(512, o, 1) + 2 * o + conv(o, o) + (conv(i, o, 1) if i != o else 0)

    attention = 2 * 256 + 4 * conv(256, 256, 1)
    total = conv(128, 512, 1) + conv(512, 512, 1) + conv(3, 128)
    total += 2 * residual(128, 128) + conv(128, 128)  # down, 32
    total += residual(128, 256) + residual(256, 256) + 2 * attention + conv(256, 256)  # 16
    total += 2 * residual(256, 256) + conv(256, 256)  # 8
    total += 2 * residual(256, 256)  # 4
    total += 2 * residual(256, 256) + attention  # middle
    total += 3 * residual(512, 256) + conv(256, 256)  # up, 4
    total += 3 * residual(512, 256) + conv(256, 256)  # 8
    total += 2 * residual(512, 256) + residual(256 + 128, 256) + 3 * attention + conv(256, 256)  # 16
    total += residual(256 + 128, 128) + 2 * residual(256, 128)  # 32
    return total + 2 * 128 + conv(128, 3)


def test_attention_stands_at_the_configured_sides_and_in_the_middle():
    model = small(image_size=16, multipliers=[1, 2, 2], attention=[16, 4])

    def sides(levels, order):
        attentive = [any(isinstance(a, AttentionBlock) for a in level.attentions) for level in levels]
        assert all(isinstance(level, Level) for level in levels)
        return {side for side, has in zip(order, attentive, strict=True) if has}

    assert sides(model.down, [16, 8, 4]) == sides(model.up, [4, 8, 16]) == {16, 4}
    assert isinstance(model.middle_attention, AttentionBlock)


def inputs(model, n=3):
    x = values(n, model.channels, model.image_size, model.image_size)
    return x, torch.tensor([0, 417, 999])[:n], torch.tensor([0, 4, 5])[:n]


def test_a_fresh_model_answers_exactly_zero_and_its_blocks_are_their_skips():
    model = small(learn_sigma=True)
    x, t, y = inputs(model)
    out = model(x.float(), t, y)
    assert out.shape == (3, 6, 8, 8)
    assert torch.count_nonzero(out) == 0
    block, h = model.down[0].blocks[0], values(2, 8, 8, 8).float()
    assert torch.equal(block(h, torch.ones(2, 32), None), h)
    (out - 1).square().mean().backward()
    moved = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"conv_out.weight", "conv_out.bias"}


def test_initial_values_depend_on_seed_and_name_and_follow_glorots_law():
    whole = dict(small(seed=3).named_parameters())
    torch.manual_seed(12345)
    with torch.no_grad():
        for name, p in whole.items():
            assert torch.equal(UNet.initial_value(name, tuple(p.shape), 3), p), name
    other = dict(small(seed=4).named_parameters())
    drawn = [name for name, p in whole.items() if torch.count_nonzero(p) and len(p.shape) > 1]
    assert not any(torch.equal(other[name], whole[name]) for name in drawn)
    weight = dict(small(width=64).named_parameters())["down.1.blocks.0.conv1.weight"].detach()
    bound = math.sqrt(6 / (9 * 64 + 9 * 128))
    assert 0.999 * bound < float(weight.abs().max()) <= bound * (1 + 1e-6)
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    norms = [name for name in whole if "norm" in name and name.endswith("weight")]
    assert norms
    assert all(bool((whole[name] == 1).all()) for name in norms)


def test_construction_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    small()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bfloat16_model_takes_float32_images_and_stays_near_its_float64_twin():
    model = randomised(small())
    for p in model.parameters():
        p.data = p.data.bfloat16().double()
    x, t, y = inputs(model)
    with torch.no_grad():
        exact = model(x, t, y)
        rough = model.bfloat16()(x.float(), t, y)
    assert rough.dtype == torch.bfloat16
    assert float((rough.double() - exact).norm() / exact.norm()) < 0.05


def test_dropout_acts_by_key_in_training_alone():
    model = randomised(small(dropout=0.3)).requires_grad_(False)
    x, t, y = inputs(model)
    keys = torch.tensor([11, 12, 13])
    quiet = model(x, t, y)
    assert torch.equal(model(x, t, y, keys), quiet)
    model.train()
    with pytest.raises(ValueError, match="keys"):
        model(x, t, y)
    dropped = model(x, t, y, keys)
    assert float((dropped - quiet).abs().flatten(1).max(1).values.min()) > 1e-3
    torch.manual_seed(99)
    assert torch.equal(model(x, t, y, keys), dropped)
    row = model(x[1:2], t[1:2], y[1:2], keys[1:2])  # whatever else is in the batch
    torch.testing.assert_close(row, dropped[1:2], rtol=0, atol=1e-10)
    other = model(x, t, y, torch.tensor([11, 12, 99]))
    torch.testing.assert_close(other[:2], dropped[:2], rtol=0, atol=1e-10)
    assert float((other[2] - dropped[2]).abs().max()) > 1e-3
    assert small(dropout=0.0).train()(x.float(), t, y).shape == x.shape


def test_recomputed_activations_give_the_same_gradients_with_the_same_dropout():
    gradients = []
    for recompute in (False, True):
        model = randomised(small(dropout=0.3)).train()
        model.activation_checkpointing = recompute
        x, t, y = inputs(model)
        model(x, t, y, torch.tensor([1, 2, 3])).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_build_follows_the_configuration():
    tree = {
        "data": {"shards": "d", "image_size": 8, "channels": 1, "batch_size": 8},
        "model": {"name": "unet", "width": 16, "multipliers": [1, 2], "attention": [4], "head_width": 8,
                  "scale_shift": True, "dropout": 0.2, "num_classes": 10, "res_blocks": 1},
        "diffusion": {"variance": "learned_range", "loss": "hybrid"},
        "run": {"seed": 5},
        "train": {"steps": 1},
    }  # fmt: skip
    model = build(Config.model_validate(tree))
    twin = UNet(8, 1, 16, [1, 2], 1, [4], 10, 8, True, 0.2, learn_sigma=True)
    initialize(twin, 5)
    assert model.out_channels == 2
    assert model.middle_attention.attn.heads == 4
    ours, theirs = model.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
