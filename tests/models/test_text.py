"""A network that attends to words: its parts against float64 code of its own, and what must change nothing."""

import numpy as np
import pytest
import torch

from dtrain.models.layers import Attention, CrossAttention, initialize
from dtrain.models.text import TextNetwork, TokenEncoder
from tests.models.told import E, L, N, bare, filled, inputs, masks, random, told_in_words, words


def attended(q, k, v, mask):
    """softmax(q kᵀ/√d) v of one head, row by row, over the tokens that there are; float64."""
    out = np.empty((len(q), q.shape[1], v.shape[2]))
    for n in range(len(q)):
        kept = np.flatnonzero(mask[n])
        logits = q[n] @ k[n][kept].T / np.sqrt(q.shape[2])
        weights = np.exp(logits - logits.max(1, keepdims=True))
        out[n] = weights / weights.sum(1, keepdims=True) @ v[n][kept]
    return out


def linear(x, layer):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cross_attention_is_the_formula(qk_norm):
    width, heads = 16, 4
    block = filled(CrossAttention(width, heads, E, qk_norm))
    x, told, mask = random((N, 5, width), 1), random((N, L, E), 2), masks()
    q, kv = linear(x.numpy(), block.q), linear(told.numpy(), block.kv)
    k, v = kv[..., :width], kv[..., width:]

    def normed(values, norm):
        if not qk_norm:
            return values
        return values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-6) * norm.weight.detach().numpy()

    size, found = width // heads, []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        found.append(
            attended(normed(q[..., own], block.q_norm), normed(k[..., own], block.k_norm), v[..., own], mask.numpy())
        )
    expected = linear(np.concatenate(found, axis=-1), block.proj)
    assert np.abs(block(x, told, mask).detach().numpy() - expected).max() < 1e-10


def test_self_attention_with_a_mask_is_the_formula():
    width, heads = 16, 4
    block = filled(Attention(width, heads))
    x, mask = random((N, L, width), 1), masks()
    q, k, v = np.split(linear(x.numpy(), block.qkv), 3, axis=-1)
    size = width // heads
    found = [
        attended(*(part[..., h * size : (h + 1) * size] for part in (q, k, v)), mask.numpy()) for h in range(heads)
    ]
    expected = linear(np.concatenate(found, axis=-1), block.proj)
    assert np.abs(block(x, mask).detach().numpy() - expected).max() < 1e-10


@pytest.mark.parametrize(("encoder", "kind"), [(True, "dit"), (False, "dit"), (False, "mmdit"), (False, "unet")])
def test_what_stands_in_the_padding_changes_nothing(encoder, kind):
    model, mask = told_in_words(encoder, kind=kind), masks()
    told, other = words(encoder), words(encoder, seed=5)
    hidden = mask.view(N, L, *[1] * (told.dim() - 2))
    mixed = torch.where(hidden, told, other)
    one, two = (model(*inputs(), text=values, text_mask=mask) for values in (told, mixed))
    assert torch.equal(one, two)
    assert not torch.equal(one, model(*inputs(), text=other, text_mask=mask))


@pytest.mark.parametrize("learned", [True, False])
def test_rows_told_nothing_are_alike_whatever_they_would_have_been_told(learned):
    model, mask = told_in_words(False, learned), masks()
    mask[1] = False
    one, two = (model(*inputs(), text=words(False, seed), text_mask=mask) for seed in (4, 5))
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], two[0])
    # Of a null of zeros stands one token of zeros, of a learned one its parameter.
    null = model.conditions["text"].null.detach() if learned else torch.zeros(1, E, dtype=torch.float64)
    told, only = torch.zeros(N, L, E, dtype=torch.float64), torch.zeros(N, L, dtype=torch.bool)
    told[:, 0], only[:, 0] = null, True
    assert torch.equal(model(*inputs(), text=told, text_mask=only)[1], one[1])


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_a_fresh_network_with_words_is_the_one_without(kind):
    """Cross-attention begins at 0, so the first outputs are those without it, whatever the rest of it is."""
    plain, model = bare(kind), bare(kind, cross=True)
    model.conditions["text"] = TextNetwork(TokenEncoder(257, L, 32, 1), 32, model.condition_width, True)
    last = "adaLN", "final_layer.linear", ".attn.proj", ".conv2", "conv_out"  # else the output is 0 whatever is inside
    for one in (plain, model):
        initialize(one, 0)
        for name, parameter in one.named_parameters():
            if any(part in name for part in last) and "conditions" not in name:
                parameter.data = 0.3 * random(tuple(parameter.shape), len(name)).float()
    x, t = (part.float() for part in inputs())
    without = plain(x, t)
    assert without.abs().max() > 0.1
    assert torch.equal(without, model(x, t, text=words(True), text_mask=masks()))
    assert {n for n, _ in plain.named_parameters()} < {n for n, _ in model.named_parameters()}


def test_a_network_that_is_not_told_what_it_attends_to_says_so():
    with pytest.raises(TypeError, match="the network is told text, and has networks for text"):
        told_in_words()(*inputs(), text=words(True))
