"""Joint attention to image and text: a block against float64 code of its own, what begins at 0, and what changes
nothing."""

import numpy as np
import pytest
import torch

from dtrain.models.layers import ConditionNetworks, Tokens, initialize, unpatchify
from dtrain.models.mmdit import MMDiT, MMDiTBlock, masked_mean
from dtrain.models.text import TextNetwork
from tests.models.told import SMALL, E, L, N, filled, inputs, masks, random, told_in_words, two_texts_and_a_class, words

WIDTH, HEADS, T = 16, 4, 5


def weights(module):
    return {name: value.detach().numpy() for name, value in module.named_parameters()}


def linear(x, own, name):
    return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]


def normed(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def rms_normed(x, gain):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def block_by_hand(block, x, text, mask, c):
    """Row by row and head by head; no token that is not there is looked at. Returns both streams, or the image's."""
    own, size = {"image": weights(block.image), "text": weights(block.text)}, WIDTH // HEADS
    last = "kv.weight" in own["text"]
    images, texts = [], []
    for n in range(len(x)):
        tokens = {"image": x[n], "text": text[n][mask[n]]}
        active = c[n] / (1 + np.exp(-c[n]))
        parts = {name: linear(active, own[name], "adaLN_modulation.1").reshape(-1, WIDTH) for name in own}
        queries, keys, values = {}, {}, {}
        for name in own:
            told = normed(tokens[name]) * (1 + parts[name][1]) + parts[name][0]
            made = linear(told, own[name], "kv" if last and name == "text" else "qkv")
            *q, k, v = (made[:, i * WIDTH : (i + 1) * WIDTH] for i in range(made.shape[1] // WIDTH))
            keys[name], values[name] = k.reshape(-1, HEADS, size), v.reshape(-1, HEADS, size)
            keys[name] = rms_normed(keys[name], own[name]["k_norm.weight"])
            if q:
                queries[name] = rms_normed(q[0].reshape(-1, HEADS, size), own[name]["q_norm.weight"])
        k, v = (np.concatenate([kind["image"], kind["text"]]) for kind in (keys, values))
        out = {}
        for name, q in queries.items():
            heads = []
            for h in range(HEADS):
                logits = q[:, h] @ k[:, h].T / np.sqrt(size)
                share = np.exp(logits - logits.max(1, keepdims=True))
                heads.append(share / share.sum(1, keepdims=True) @ v[:, h])
            _, _, gate1, shift2, scale2, gate2 = parts[name]
            y = tokens[name] + gate1 * linear(np.concatenate(heads, axis=1), own[name], "proj")
            hidden = gelu(linear(normed(y) * (1 + scale2) + shift2, own[name], "mlp.fc1"))
            out[name] = y + gate2 * linear(hidden, own[name], "mlp.fc2")
        images.append(out["image"])
        texts.append(out.get("text"))
    return np.stack(images), texts


@pytest.mark.parametrize("last", [False, True])
def test_a_block_is_the_formula(last):
    block = filled(MMDiTBlock(WIDTH, HEADS, 4, last))
    x, text, mask, c = random((N, T, WIDTH), 1), random((N, L, WIDTH), 2), masks(), random((N, WIDTH), 3)
    found, told = (part.detach().numpy() for part in block(x, text, mask, c))
    image, texts = block_by_hand(block, x.numpy(), text.numpy(), mask.numpy(), c.numpy())
    assert np.abs(found - image).max() < 1e-10
    for n in range(N):
        expected = text[n][mask[n]].numpy() if last else texts[n]  # behind the last block nobody reads the text
        assert np.abs(told[n][mask[n].numpy()] - expected).max() < 1e-10


def test_the_masked_mean_is_of_the_tokens_that_there_are():
    values, mask = random((N, L, E), 1), masks()
    expected = torch.stack([values[n, mask[n]].mean(0) for n in range(N)])
    assert torch.allclose(masked_mean(Tokens(values, mask)), expected, rtol=0, atol=1e-12)


def test_every_parameter_is_trained_that_is_not_the_positions():
    model = told_in_words(kind="mmdit")
    model(*inputs(), text=words(True), text_mask=masks()).square().sum().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert still == {"pos_embed", "conditions.text.null"}  # all rows are told something


def test_a_fresh_network_says_0_and_its_blocks_are_the_identity():
    model = MMDiT(**SMALL)
    model.conditions["text"] = TextNetwork(None, E, model.condition_width, True)
    initialize(model, 0)
    (x, t), told = (part.float() for part in inputs()), {"text": words(False).float(), "text_mask": masks()}
    assert torch.equal(model(x, t, **told), torch.zeros(N, 3, 12, 12))
    for part in ("final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"):
        weight = model.get_parameter(part)
        weight.data = random(tuple(weight.shape), 1).float()
    vectors, tokens = model.conditions(told)
    c = model.t_embedder(t) + vectors + model.pooled_embedder(masked_mean(tokens))
    expected = unpatchify(model.final_layer(model.x_embedder(x) + model.pos_embed, c), model.patch)
    assert expected.abs().max() > 1
    assert torch.equal(model(x, t, **told), expected)


def told_two(seed=0):
    one, two = words(False, 4 + seed), words(False, 5 + seed)
    return {"one": one, "two": two, "one_mask": masks(), "two_mask": masks().flip(0)}


def test_several_texts_and_a_class_stand_side_by_side():
    """Each moves the output; the tokens of all are one stream, in which their order is of no account."""
    model, y, told = two_texts_and_a_class(), torch.tensor([0, 3, 4]), told_two()
    bare = model(*inputs(), y, **told)
    assert not torch.equal(bare, model(*inputs(), torch.tensor([1, 3, 4]), **told))
    assert not torch.equal(bare, model(*inputs(), y, **told | {"one": words(False, 9)}))
    assert not torch.equal(bare, model(*inputs(), y, **told | {"two": words(False, 9)}))
    swapped = two_texts_and_a_class()
    swapped.conditions = ConditionNetworks({name: model.conditions[name] for name in ("two", "one")})
    assert torch.allclose(bare, swapped(*inputs(), y, **told), rtol=0, atol=1e-10)


def test_words_that_are_the_same_mean_pooled_still_differ():
    """Never a pooled vector alone: two captions with one mean are told apart, by the attention to their tokens."""
    model = told_in_words(False, kind="mmdit")
    model.conditions["text"].words["norm"] = torch.nn.Identity()  # so that a mean of inputs is one of tokens
    told, mask = words(False), torch.ones(N, L, dtype=torch.bool)
    other = told.clone()
    other[:, 0], other[:, 1] = told[:, 0] + 1, told[:, 1] - 1
    pooled = [masked_mean(model.conditions({"text": one, "text_mask": mask})[1]) for one in (told, other)]
    assert torch.allclose(*pooled, rtol=0, atol=1e-12)
    one, two = (model(*inputs(), text=values, text_mask=mask) for values in (told, other))
    assert (one - two).abs().max() > 1e-3


def test_recomputed_activations_give_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = two_texts_and_a_class()
        model.train().activation_checkpointing = checkpointing
        model(*inputs(), torch.tensor([0, 3, 4]), **told_two()).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
