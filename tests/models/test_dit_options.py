"""JiT's options of a DiT (Li & He 2025): gated perceptrons, RMSNorm, rotary positions, a bottleneck, class tokens."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dtrain.checkpoint.export import WRITERS
from dtrain.config import load
from dtrain.errors import UserError
from dtrain.models.adapted import Adapted, adapted_layers
from dtrain.models.build import allocate
from dtrain.models.control import Controlled, DiTCopy
from dtrain.models.dit import DiT
from dtrain.models.layers import SwiGLU, initialize, norm_of, perceptron_of
from dtrain.models.rotary import rotated, rotations
from tests.digits import CONFIG
from tests.models.told import filled, random

SMALL = {"image_size": 12, "channels": 3, "patch": 3, "width": 32, "depth": 3, "heads": 4, "num_classes": 5}
OPTIONS = [
    {"norm": "rms"},
    {"mlp": "swiglu"},
    {"rotary": True},
    {"bottleneck": 6},
    {"context_tokens": 4, "context_from": 1},
]
ALL = {key: value for option in OPTIONS for key, value in option.items()} | {"qk_norm": True}
KEYS = ["model.norm=rms", "model.mlp=swiglu", "model.positions=rotary", "model.patch_bottleneck=6"]
KEYS += ["model.context_tokens=4"]


def inputs():
    return random((3, 3, 12, 12), 3), torch.tensor([0.0, 417.0, 999.0]), torch.tensor([0, 4, 5])


def from_the_equations(w, x, t, y, patch, heads, depth, context_from, rotary):
    """The forward pass in NumPy; what the parameters do not say is given."""

    def linear(name, v):
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(v):
        return v / (1 + np.exp(-v))

    def normed(name, v):
        if f"{name}.weight" in w:
            return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]
        v = v - v.mean(-1, keepdims=True)
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6)

    def turned(v, side):
        """Pairs as complex numbers, times e^(iθ): v (N, T, H, W) with the class's tokens in front."""
        pairs = v.reshape(*v.shape[:-1], -1, 2)
        z, quarter = pairs[..., 0] + 1j * pairs[..., 1], v.shape[-1] // 4
        for token in range(side * side):
            at = v.shape[1] - side * side + token
            for i in range(quarter):
                for half, place in enumerate(divmod(token, side)):
                    z[:, at, :, half * quarter + i] *= np.exp(1j * place / 10000 ** (i / quarter))
        return np.stack([z.real, z.imag], -1).reshape(v.shape)

    def perceptron(name, v):
        if f"{name}.w3.weight" not in w:
            v = linear(f"{name}.fc1", v)
            v = 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
            return linear(f"{name}.fc2", v)
        gate, value = np.split(linear(f"{name}.w12", v), 2, axis=-1)
        return linear(f"{name}.w3", silu(gate) * value)

    N, C, size, _ = x.shape
    side = size // patch
    patches = x.reshape(N, C, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5).reshape(N, side * side, -1)
    if "x_embedder.proj1.weight" in w:
        few = patches @ w["x_embedder.proj1.weight"].reshape(-1, patches.shape[-1]).T
        h = few @ w["x_embedder.proj2.weight"][:, :, 0, 0].T + w["x_embedder.proj2.bias"]
    else:
        h = patches @ w["x_embedder.proj.weight"].reshape(-1, patches.shape[-1]).T + w["x_embedder.proj.bias"]
    h = h + w["pos_embed"]
    D = h.shape[-1]
    waves = t[:, None] / 10000 ** (np.arange(128) / 128)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", np.concatenate([np.cos(waves), np.sin(waves)], 1))))
    label = w["y_embedder.embedding_table.weight"][y]
    c = c + label
    for b in range(depth):
        if b == context_from and "in_context_posemb" in w:
            h = np.concatenate([label[:, None] + w["in_context_posemb"], h], axis=1)
        m = linear(f"blocks.{b}.adaLN_modulation.1", silu(c)).reshape(N, 6, 1, D)
        z = normed(f"blocks.{b}.norm1", h) * (1 + m[:, 1]) + m[:, 0]
        qkv = linear(f"blocks.{b}.attn.qkv", z).reshape(N, -1, 3, heads, D // heads)
        q, k = qkv[:, :, 0], qkv[:, :, 1]
        if f"blocks.{b}.attn.q_norm.weight" in w:
            q, k = normed(f"blocks.{b}.attn.q_norm", q), normed(f"blocks.{b}.attn.k_norm", k)
        if rotary:
            q, k = turned(q, side), turned(k, side)
        scores = np.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(D // heads)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        mixed = np.einsum("nhqk,nkhd->nqhd", share, qkv[:, :, 2]).reshape(N, -1, D)
        h = h + m[:, 2] * linear(f"blocks.{b}.attn.proj", mixed)
        h = h + m[:, 5] * perceptron(f"blocks.{b}.mlp", normed(f"blocks.{b}.norm2", h) * (1 + m[:, 4]) + m[:, 3])
    h = h[:, h.shape[1] - side * side :]
    m = linear("final_layer.adaLN_modulation.1", silu(c)).reshape(N, 2, 1, D)
    pixels = linear("final_layer.linear", normed("final_layer.norm_final", h) * (1 + m[:, 1]) + m[:, 0])
    pixels = pixels.reshape(N, side, side, patch, patch, -1)
    return pixels.transpose(0, 5, 1, 3, 2, 4).reshape(N, -1, size, size)


@pytest.mark.parametrize("options", [*OPTIONS, {"context_tokens": 2, "context_from": 0}, ALL], ids=str)
def test_the_forward_equals_the_equations(options):
    model = filled(DiT(**SMALL | options)).eval()
    x, t, y = inputs()
    w = {k: v.numpy() for k, v in model.state_dict().items()}
    given = {"context_from": options.get("context_from"), "rotary": options.get("rotary", False)}
    expected = from_the_equations(w, x.numpy(), t.double().numpy(), y.numpy(), 3, 4, 3, **given)
    with torch.no_grad():
        ours = model(x, t.double(), y).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("depth", "width", "heads", "bottleneck", "first", "millions", "gigas"),
    [(12, 768, 12, 128, 4, 131, 25), (24, 1024, 16, 128, 8, 459, 88), (32, 1280, 16, 256, 10, 953, 182)],
    ids=["B/16", "L/16", "H/16"],
)
def test_the_published_sizes_have_their_published_parameters_and_operations(
    depth, width, heads, bottleneck, first, millions, gigas
):
    """Li & He 2025, at 256 × 256; an operation there is a multiply-add."""
    with torch.device("meta"):
        own = {"bottleneck": bottleneck, "context_tokens": 32, "context_from": first, "qk_norm": True}
        model = DiT(256, 3, 16, width, depth, heads, 1000, norm="rms", mlp="swiglu", rotary=True, **own)
        given = torch.empty(1, 3, 256, 256), torch.empty(1), torch.empty(1, dtype=torch.long)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*given)
    assert round(counter.get_total_flops() / 2e9) == gigas


def test_products_of_turned_queries_and_keys_know_differences_of_places_alone():
    side, head = 5, 16
    q, k = random((head,), 0), random((head,), 1)
    rotation = rotations(side, head, 0, q)
    turned = [rotated(v.expand(1, 1, side**2, head), rotation)[0, 0] for v in (q, k)]
    scores = (turned[0] @ turned[1].T).view(side, side, side, side)  # row and column of q, then of k
    found = {}
    for place in np.ndindex(side, side, side, side):
        away = place[2] - place[0], place[3] - place[1]
        found.setdefault(away, []).append(float(scores[place]))
    assert len(found) == (2 * side - 1) ** 2
    assert max(max(values) - min(values) for values in found.values()) < 1e-12
    assert len({round(values[0], 6) for values in found.values()}) == len(found)  # and they do know them
    torch.testing.assert_close(turned[0].norm(dim=1), q.norm().expand(side**2), rtol=0, atol=1e-12)


def test_tokens_of_the_class_are_not_turned_and_halves_are_rounded_once():
    rotation = rotations(3, 8, 4, torch.zeros(1, dtype=torch.bfloat16))
    assert (rotation.shape, rotation.dtype) == ((2, 13, 4), torch.float32)
    x = random((2, 2, 13, 8), 0).bfloat16()
    turned = rotated(x, rotation)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned[:, :, :4], x[:, :, :4])
    exact = rotated(x.double(), rotations(3, 8, 4, torch.zeros(1, dtype=torch.float64)))
    torch.testing.assert_close(turned.double(), exact, rtol=2**-8, atol=2**-8)


def test_the_gated_perceptron_and_the_norm_are_torchs():
    x, layer = random((2, 5, 32), 0), filled(perceptron_of("swiglu", 32, 4 * 32))
    assert isinstance(layer, SwiGLU)
    assert layer.w3.in_features == 85  # ⌊2/3 · 128⌋
    gate, value = F.linear(x, layer.w12.weight, layer.w12.bias).tensor_split(2, dim=-1)
    torch.testing.assert_close(layer(x), F.linear(F.silu(gate) * value, layer.w3.weight, layer.w3.bias))
    norm = filled(norm_of("rms", 32))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (32,), norm.weight, 1e-6))


def test_a_fresh_model_answers_zero_learns_its_output_first_and_begins_by_its_laws():
    model = DiT(**SMALL | ALL)
    initialize(model, 0)
    x, t, y = inputs()
    out = model(x.float(), t, y)
    assert torch.count_nonzero(out) == 0
    (out - 1).square().mean().backward()
    moved = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"final_layer.linear.weight", "final_layer.linear.bias"}
    w = {name: p.detach() for name, p in model.named_parameters()}
    norms = [name for name in w if "norm" in name]
    assert len(norms) == 3 * 4 + 1
    assert all(torch.equal(w[name], torch.ones_like(w[name])) for name in norms)
    assert float(w["in_context_posemb"].std()) == pytest.approx(0.02, rel=0.2)
    for name, fans in {"x_embedder.proj1": 6 + 27, "x_embedder.proj2": 32 + 6, "blocks.1.mlp.w12": 32 + 170}.items():
        assert float(w[f"{name}.weight"].abs().max()) == pytest.approx(math.sqrt(6 / fans), rel=0.03)
    assert {n for n, p in w.items() if not p.any()} == {
        n for n in w if n.endswith("bias") or "adaLN" in n or n == "final_layer.linear.weight"
    }


def test_every_parameter_of_a_model_with_all_options_gets_a_gradient():
    model = filled(DiT(**SMALL | ALL))
    model(*inputs()[:1], *(v for v in inputs()[1:])).square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()} == {"pos_embed"}


def test_recomputed_activations_give_the_same_gradients():
    found = []
    for recomputed in (False, True):
        model = filled(DiT(**SMALL | ALL)).train()
        model.activation_checkpointing = recomputed
        model(*inputs()).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("depth", [3, 6])
def test_a_copy_that_pictures_control_has_the_options_and_adds_to_the_tokens_of_the_class_too(depth):
    """Of depth 3 the copy has blocks 0 and 1, of which the second has the class's tokens; by hand."""
    sizes = SMALL | ALL | {"depth": depth}
    base, copy = filled(DiT(**sizes)), DiTCopy(**sizes, picture=(1, 12))
    model = Controlled({"ink": copy}).stand_on(base)
    initialize(model.double(), 0)
    x, t, y = inputs()
    picture = {"ink": torch.rand(3, 1, 12, 12).double(), "ink_scale": torch.ones(3, 2)}
    assert torch.equal(model(x, t, y, **picture), base(x, t, y))
    filled(model, seed=9)
    g, d, _ = copy.embedded(x, t, y, {})
    g = g + copy.hint(picture["ink"]).flatten(2).transpose(1, 2)
    added, rotation = [], rotations(4, 8, 4, x)
    for number, join in enumerate(copy.joins):
        if number == 1:
            g = torch.cat([copy.y_embedder(y)[:, None] + copy.in_context_posemb, g], dim=1)
        g = copy.blocks[number](g, d, None, rotation[:, 0 if number else 4 :])
        added.append(join(g))
    assert [one.shape[1] for one in added] == [16, 20, 20][: (depth + 1) // 2]
    torch.testing.assert_close(model(x, t, y, **picture), base(x, t, y, added=added), rtol=1e-10, atol=1e-10)


def test_a_copy_that_ends_before_the_tokens_of_the_class_has_none():
    copy = DiTCopy(**SMALL | ALL | {"depth": 4, "context_from": 2}, picture=(1, 12))
    assert "in_context_posemb" not in dict(copy.named_parameters())


def test_gated_perceptrons_are_adapted_and_what_is_merged_computes_the_same():
    base = filled(DiT(**SMALL | ALL))
    layers = {name: (one.in_features, one.out_features) for name, one in adapted_layers(base)}
    assert {name.partition("blocks.0.")[2] for name in layers} >= {"attn.qkv", "attn.proj", "mlp.w12", "mlp.w3"}
    assert len(layers) == 3 * 4
    model = filled(Adapted(layers, 3, 1.5).stand_on(base).double(), seed=5)
    answer, merged = model(*inputs()), model.merged()
    with torch.no_grad():
        for name, p in base.named_parameters():
            p.copy_(merged[name])
    torch.testing.assert_close(base(*inputs()), answer, rtol=1e-9, atol=1e-9)


def test_a_config_names_the_options_and_their_defaults_are_the_published_dit():
    model = allocate(load(CONFIG, [*KEYS, "model.qk_norm=true"]))
    assert (model.context_tokens, model.context_from, model.head) == (4, 1, 24)  # a third of four blocks
    assert model.in_context_posemb.shape == (1, 4, 96)
    assert model.x_embedder.proj1.weight.shape == (6, 1, 2, 2)
    assert allocate(load(CONFIG, [*KEYS, "model.context_from=3"])).context_from == 3
    plain = load(CONFIG).model
    assert plain.unlike_published is None
    for key in KEYS:
        assert load(CONFIG, [key]).model.unlike_published == key.replace("=", " ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.positions=rotary", "model.heads=48"], r"width/heads, which is 2, must be a multiple of 4"),
        (["model.context_from=2"], r"context_from 2 has no effect with context_tokens 0; take 32"),
        (["model.context_tokens=4", "model.num_classes=0"], r"made of the class, and num_classes is 0; leave them out"),
        (["model.context_tokens=4", "model.context_from=4"], r"context_from 4 must be less than depth 4; null is 1"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load(CONFIG, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", ["published", "diffusers"])
@pytest.mark.parametrize("key", KEYS)
def test_no_export_to_the_published_architecture_has_a_place_for_them(tmp_path, key, format):
    config = load(CONFIG, [key])
    with pytest.raises(UserError, match=f"which has no {key.replace('=', ' ')}; take --format safetensors"):
        WRITERS[format](allocate(config), config, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
