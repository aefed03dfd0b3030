import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dtrain.config import Config
from dtrain.config.models import DIT_SIZES as SIZES
from dtrain.diffusion.guidance import guided
from dtrain.models.build import build
from dtrain.models.dit import DiT
from dtrain.models.layers import initialize, positions, timestep_embedding
from dtrain.models.published import load_published

PARAMETERS = {
    "S/2": 32_963_360,
    "S/4": 32_945_024,
    "S/8": 33_148_160,
    "B/2": 130_512_416,
    "B/4": 130_475_648,
    "B/8": 130_881_536,
    "L/2": 458_102_816,
    "L/4": 458_053_760,
    "L/8": 458_594_816,
    "XL/2": 675_129_632,
    "XL/4": 675_074_432,
    "XL/8": 675_683_072,
}
SMALL = {"image_size": 12, "channels": 3, "patch": 2, "width": 32, "depth": 2, "heads": 4, "num_classes": 5}


def small(seed=0, **changes):
    model = DiT(**SMALL | changes)
    initialize(model, seed)
    return model


def randomised(seed=0, **changes):
    """Float64, every trained parameter random: a fresh model hides its blocks behind zeros."""
    model, generator = small(**changes).double(), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model


def inputs(model, n=3):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, model.channels, model.image_size, model.image_size, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 417, 999])[:n], torch.tensor([0, 4, 5])[:n]


def config(**model):
    return Config.model_validate(
        {
            "data": {"shards": "d", "image_size": 8, "channels": 1, "batch_size": 8},
            "model": {"name": "dit", "num_classes": 10} | model,
            "train": {"steps": 1},
        }
    )


def test_all_twelve_published_sizes_have_their_published_parameter_counts():
    assert set(SIZES) == set(PARAMETERS)
    for name, size in SIZES.items():
        with torch.device("meta"):
            model = DiT(image_size=32, channels=4, num_classes=1000, learn_sigma=True, **size)
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name], name


@pytest.mark.parametrize(("size", "gmacs"), [("S/2", 6.06), ("B/2", 23.0), ("L/2", 80.7), ("XL/2", 118.6)])
def test_a_forward_costs_the_published_multiply_adds(size, gmacs):
    with torch.device("meta"):
        model = DiT(image_size=32, channels=4, num_classes=1000, learn_sigma=True, **SIZES[size])
        x, t, y = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.05)


def test_parameters_carry_the_published_names_and_shapes():
    D, p = 32, 2
    layers = {"x_embedder.proj": (D, 3, p, p), "t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D)}
    layers |= {"final_layer.linear": (p * p * 6, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    for i in range(2):
        layers |= {f"blocks.{i}.attn.qkv": (3 * D, D), f"blocks.{i}.attn.proj": (D, D)}
        layers |= {f"blocks.{i}.mlp.fc1": (4 * D, D), f"blocks.{i}.mlp.fc2": (D, 4 * D)}
        layers |= {f"blocks.{i}.adaLN_modulation.1": (6 * D, D)}
    expected = {f"{k}.weight": v for k, v in layers.items()} | {f"{k}.bias": v[:1] for k, v in layers.items()}
    expected |= {"pos_embed": (1, 36, D), "y_embedder.embedding_table.weight": (6, D)}
    model = small(learn_sigma=True)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert [k for k, v in model.named_parameters() if not v.requires_grad] == ["pos_embed"]


def from_the_equations(w, x, t, y, patch, heads, depth, shift=0):
    """DiT's forward by einsum over NumPy arrays, one parameter dictionary in, pixels out."""

    def rms_normalised(name, v):
        if f"{name}.weight" not in w:
            return v
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]

    def linear(name, v):
        return np.einsum("...i,oi->...o", v, w[f"{name}.weight"]) + w[f"{name}.bias"]

    def silu(v):
        return v / (1 + np.exp(-v))

    def normalised(v):
        mean = v.mean(-1, keepdims=True)
        return (v - mean) / np.sqrt(((v - mean) ** 2).mean(-1, keepdims=True) + 1e-6)

    def gelu(v):
        return 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    N, C, height, _ = x.shape
    side = height // patch
    D = w["pos_embed"].shape[-1]
    patches = x.reshape(N, C, side, patch, side, patch)
    tokens = np.einsum("ncipjq,dcpq->nijd", patches, w["x_embedder.proj.weight"]) + w["x_embedder.proj.bias"]
    h = tokens.reshape(N, side * side, D) + w["pos_embed"]

    waves = np.array([[tt / 10000 ** (k / (128 - shift)) for k in range(128)] for tt in t])
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", np.concatenate([np.cos(waves), np.sin(waves)], 1))))
    if y is not None:
        c = c + w["y_embedder.embedding_table.weight"][y]

    for b in range(depth):
        m = linear(f"blocks.{b}.adaLN_modulation.1", silu(c)).reshape(N, 6, 1, D)
        z = normalised(h) * (1 + m[:, 1]) + m[:, 0]
        qkv = linear(f"blocks.{b}.attn.qkv", z).reshape(N, -1, 3, heads, D // heads)
        q = rms_normalised(f"blocks.{b}.attn.q_norm", qkv[:, :, 0])
        k = rms_normalised(f"blocks.{b}.attn.k_norm", qkv[:, :, 1])
        scores = np.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(D // heads)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("nhqk,nkhd->nqhd", weights, qkv[:, :, 2]).reshape(N, -1, D)
        h = h + m[:, 2] * linear(f"blocks.{b}.attn.proj", mixed)
        z = normalised(h) * (1 + m[:, 4]) + m[:, 3]
        h = h + m[:, 5] * linear(f"blocks.{b}.mlp.fc2", gelu(linear(f"blocks.{b}.mlp.fc1", z)))

    m = linear("final_layer.adaLN_modulation.1", silu(c)).reshape(N, 2, 1, D)
    pixels = linear("final_layer.linear", normalised(h) * (1 + m[:, 1]) + m[:, 0])
    pixels = pixels.reshape(N, side, side, patch, patch, -1)
    return np.einsum("nijpqc->ncipjq", pixels).reshape(N, -1, height, height)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_sigma": True},
        {"num_classes": 0},
        {"qk_norm": True},
        {"frequency_shift": 1},
        {"image_size": 8, "channels": 1, "patch": 4, "heads": 2, "depth": 3},
    ],
)
def test_the_forward_equals_the_papers_equations(changes):
    model = randomised(**changes)
    x, t, y = inputs(model)
    w = {k: v.numpy() for k, v in model.state_dict().items()}
    sizes = {k: (SMALL | changes)[k] for k in ("patch", "heads", "depth")}
    sizes["shift"] = changes.get("frequency_shift", 0)
    expected = from_the_equations(w, x.numpy(), t.tolist(), y.numpy() if model.num_classes else None, **sizes)
    with torch.no_grad():
        ours = model(x, t, y).numpy()
    assert ours.shape == (3, model.out_channels, model.image_size, model.image_size)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_a_fresh_model_answers_exactly_zero_and_learns_its_output_layer_first():
    model = small()
    x, t, y = inputs(model)
    out = model(x.float(), t, y)
    assert torch.count_nonzero(out) == 0
    (out - 1).square().mean().backward()
    moved = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"final_layer.linear.weight", "final_layer.linear.bias"}


def test_an_unconditional_model_has_no_label_table_and_ignores_labels():
    model = randomised(num_classes=0)
    x, t, y = inputs(model)
    assert not any(k.startswith("y_embedder") for k in model.state_dict())
    assert torch.equal(model(x, t), model(x, t, y))


def test_initial_values_depend_on_seed_and_name_and_on_nothing_else():
    whole = dict(small(seed=3).named_parameters())
    torch.manual_seed(12345)
    backwards = DiT(**SMALL)
    with torch.no_grad():
        for name, p in reversed(list(backwards.named_parameters())):
            p.copy_(DiT.initial_value(name, tuple(p.shape), 3))
    for name, p in backwards.named_parameters():
        assert torch.equal(p, whole[name]), name
    deeper = dict(small(seed=3, depth=4).named_parameters())
    assert all(torch.equal(deeper[name], p) for name, p in whole.items())

    other = dict(small(seed=4).named_parameters())
    drawn = [name for name, p in whole.items() if name != "pos_embed" and torch.count_nonzero(p)]
    assert len(drawn) == 2 * 4 + 4  # each block's four weights; patches, times (2), labels
    assert not any(torch.equal(other[name], whole[name]) for name in drawn)
    assert len({whole[name].flatten()[0].item() for name in drawn}) == len(drawn)


def test_construction_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    small()
    assert torch.equal(torch.get_rng_state(), before)


def test_initial_values_follow_the_papers_laws():
    D = 128
    w = {k: v.detach().double() for k, v in small(width=D, num_classes=1000).named_parameters()}
    for name, fans in {
        "blocks.1.attn.qkv.weight": D + 3 * D,
        "blocks.0.attn.proj.weight": D + D,
        "blocks.0.mlp.fc1.weight": D + 4 * D,
        "blocks.1.mlp.fc2.weight": 4 * D + D,
        "x_embedder.proj.weight": D + 3 * 2 * 2,
    }.items():
        bound = math.sqrt(6 / fans)
        assert 0.99 * bound < float(w[name].abs().max()) <= bound * (1 + 1e-6)
        n = w[name].numel()
        assert abs(float(w[name].mean())) < 5 * bound / math.sqrt(3 * n)
        assert abs(float(w[name].square().mean()) / (bound**2 / 3) - 1) < 5 * math.sqrt(0.8 / n)  # kurtosis 9/5
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        n = w[name].numel()
        assert abs(float(w[name].mean())) < 5 * 0.02 / math.sqrt(n)
        assert abs(float(w[name].square().mean()) / 0.02**2 - 1) < 5 * math.sqrt(2 / n)
    zero = [k for k, v in w.items() if not torch.count_nonzero(v)]
    assert all(k in zero for k in w if k.endswith("bias") or "adaLN" in k or k == "final_layer.linear.weight")


def test_positions_encode_the_column_in_the_first_half_and_the_row_in_the_second():
    table = positions(5, 16)[0].double().numpy()
    for row in range(5):
        for column in range(5):
            omega = [10000 ** (-i / 4) for i in range(4)]
            expected = [f(place * o) for place in (column, row) for f in (math.sin, math.cos) for o in omega]
            np.testing.assert_allclose(table[row * 5 + column], expected, rtol=0, atol=1e-7)


def test_a_bfloat16_model_still_tells_timestep_999_from_1000():
    model = small().bfloat16()
    seen = []
    model.t_embedder.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    a, b = model.t_embedder(torch.tensor([999, 1000]))
    (waves,) = seen
    assert waves.dtype == torch.bfloat16
    exact = timestep_embedding(torch.tensor([999, 1000]), 256, torch.float64)
    np.testing.assert_allclose(waves.double(), exact, rtol=2**-8, atol=5e-4)
    assert not torch.equal(waves[0], waves[1])
    assert not torch.equal(a, b)


def test_a_bfloat16_model_takes_float32_images_and_stays_near_its_float64_twin():
    model = randomised()
    for p in model.parameters():
        p.data = p.data.bfloat16().double()
    x, t, y = inputs(model)
    with torch.no_grad():
        exact = model(x, t, y)
        rough = model.bfloat16()(x.float(), t, y)
    assert rough.dtype == torch.bfloat16
    assert float((rough.double() - exact).norm() / exact.norm()) < 0.03


def test_autocast_computes_a_float32_model_in_bfloat16():
    model = randomised().float()
    x, t, y = inputs(model)
    with torch.no_grad():
        exact = model(x.float(), t, y)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x.float(), t, y)
    assert rough.dtype == torch.bfloat16
    assert 0 < float((rough.float() - exact).norm() / exact.norm()) < 0.03


def test_build_follows_the_configuration_and_its_seed():
    model = build(config(depth=2, width=32, heads=2, patch=2))
    assert (model.image_size, model.channels, model.num_classes, model.out_channels) == (8, 1, 10, 1)
    twin = DiT(8, 1, patch=2, width=32, depth=2, heads=2, num_classes=10)
    initialize(twin, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_build_takes_a_size_of_the_paper_and_lets_keys_override_it():
    with torch.device("meta"):
        model = build(config(size="XL/4", depth=3))
    assert len(model.blocks) == 3
    assert model.pos_embed.shape == (1, 4, 1152)
    assert model.pos_embed.is_meta


def test_normalised_queries_and_keys_begin_as_they_are_and_add_two_vectors_a_block():
    plain, normed = small(), small(qk_norm=True)
    added = normed.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"blocks.{i}.attn.{n}_norm.weight" for i in range(2) for n in "qk"}
    assert all(bool((normed.state_dict()[name] == torch.ones(8)).all()) for name in added)
    assert build(config(depth=1, width=32, heads=4, patch=2, qk_norm=True)).blocks[0].attn.q_norm.weight.shape == (8,)


def test_a_learned_variance_doubles_the_output_channels():
    tree = config(depth=1, width=32, heads=4, patch=2).model_dump()
    tree["diffusion"] |= {"variance": "learned_range", "loss": "hybrid"}
    assert build(Config.model_validate(tree)).out_channels == 2


@pytest.mark.parametrize("layout", ["bare", "ema", "model"])
def test_official_weights_of_latents_load_in_each_layout_and_their_guided_output_is_the_equations(tmp_path, layout):
    """A bare state dict, or a file of two sets. DiT guides three of four channels, and no learned variance."""
    theirs, other = (randomised(seed, channels=4, learn_sigma=True) for seed in (0, 1))
    state, file = theirs.state_dict(), tmp_path / "DiT.pt"
    torch.save(
        state if layout == "bare" else {"ema": other.state_dict(), "model": other.state_dict()} | {layout: state}, file
    )
    which = None if layout == "bare" else layout
    ours = load_published(randomised(2, channels=4, learn_sigma=True), file, which)
    x, t, y = inputs(ours)
    w, sizes = {k: v.numpy() for k, v in state.items()}, {k: SMALL[k] for k in ("patch", "heads", "depth")}
    cond, uncond = (from_the_equations(w, x.numpy(), t.tolist(), label, **sizes) for label in (y.numpy(), [5, 5, 5]))
    expected = np.concatenate([uncond[:, :3] + 4 * (cond - uncond)[:, :3], cond[:, 3:]], axis=1)
    null = lambda condition: {"y": torch.full_like(condition["y"], 5)}  # noqa: E731
    with torch.no_grad():
        found = guided(ours, 4.0, null, channels=3)(x, t, y=y).numpy()
    assert found.shape == (3, 8, 12, 12)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
