"""Low-rank adapters: at their beginning the base bit for bit, then its layers with the products; and merged."""

import pytest
import torch

from dtrain.models.adapted import Adapted, adapted_layers
from dtrain.models.layers import initialize
from tests.models.told import N, bare, filled, inputs, masks, told_in_words, words

RANK, ALPHA = 3, 1.5


def adapted(kind="dit", random_adapters=True, in_words=False):
    """(an adapted network, its base with random parameters), both float64."""
    base = told_in_words(kind=kind) if in_words else filled(bare(kind))
    layers = {name: (one.in_features, one.out_features) for name, one in adapted_layers(base)}
    model = Adapted(layers, RANK, ALPHA).stand_on(base).double()
    if random_adapters:
        filled(model, seed=5)
    else:
        initialize(model, seed=0)
    return model, base


def told(in_words):
    return {"text": words(True), "text_mask": masks()} if in_words else {}


@pytest.mark.parametrize(("kind", "in_words"), [("dit", False), ("dit", True), ("unet", True)])
def test_at_the_beginning_the_answer_is_the_bases_bit_for_bit(kind, in_words):
    model, base = adapted(kind, False, in_words)
    bare_answer = base(*inputs(), **told(in_words))
    assert torch.equal(model(*inputs(), **told(in_words)), bare_answer)
    assert any(p.any() for p in model.parameters())
    model, base = adapted(kind, True, in_words)
    assert not torch.allclose(model(*inputs(), **told(in_words)), bare_answer)
    assert torch.equal(base(*inputs(), **told(in_words)), bare_answer)  # the base by itself is what it was


@pytest.mark.parametrize(("kind", "in_words"), [("dit", False), ("dit", True), ("unet", True)])
def test_what_is_merged_computes_the_same(kind, in_words):
    """Against a plain network whose weights are W + alpha/r · B A, made here by hand."""
    model, base = adapted(kind, True, in_words)
    expected = {name: p.detach().clone() for name, p in base.named_parameters()}
    for name, adapter in model.adapters():
        expected[f"{name}.weight"] += ALPHA / RANK * adapter.B.weight.detach() @ adapter.A.weight.detach()
    merged = model.merged()
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[name], expected[name], atol=1e-12) for name in merged)
    answer = model(*inputs(), **told(in_words))
    with torch.no_grad():
        for name, p in base.named_parameters():
            p.copy_(merged[name])
    plain = base(*inputs(), **told(in_words))
    assert torch.allclose(plain, answer, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_attention_and_perceptrons_are_adapted_and_only_the_products_learn(kind):
    model, base = adapted(kind, True, in_words=True)
    names = [name for name, _ in adapted_layers(base)]
    per_block = 7 if kind == "dit" else 5  # qkv, proj; q, kv, proj of the words'; of a DiT fc1, fc2
    assert len(names) % per_block == 0
    assert not any(name.startswith("conditions.") for name in names)
    model.train()
    model(*inputs(), **told(True)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    assert len(list(model.parameters())) == 2 * len(names)
    assert len(inputs()[0]) == N


def test_no_hook_stays_where_the_base_raises():
    model, base = adapted()
    with pytest.raises(TypeError):
        model(*inputs(), nobody=torch.zeros(N))
    assert not any(module._forward_hooks for module in base.modules())
