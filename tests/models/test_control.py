"""A control network: at its beginning the base bit for bit, then as the equations say; the base is no part of it."""

import numpy as np
import pytest
import torch

from dtrain.models.control import Controlled, DiTCopy, Hint, UNetCopy
from dtrain.models.dit import DiT
from dtrain.models.layers import initialize, unpatchify
from dtrain.models.text import TextNetwork
from dtrain.models.unet import UNet
from tests.models.told import E, L, N, filled, masks, random

SIDE = 12
DIT = {"patch": 2, "width": 16, "depth": 4, "heads": 2, "num_classes": 3}
UNET = {"width": 8, "multipliers": [1, 2], "res_blocks": 1, "attention": [6], "num_classes": 3, "dropout": 0.0}
KINDS = [("dit", DiT, DiTCopy, DIT), ("unet", UNet, UNetCopy, UNET)]


def controlled(kind, names=("ink",), words=False, random_copies=False):
    """(a controlled network, its base with random parameters), both float64."""
    _, of_base, of_copy, sizes = next(one for one in KINDS if one[0] == kind)
    base = of_base(SIDE, 3, **sizes, cross=words)
    copies = {name: of_copy(SIDE, 3, **sizes, cross=words, picture=(1, 2 * SIDE)) for name in names}
    for module in (base, *copies.values()):
        if words:
            module.conditions["text"] = TextNetwork(None, E, module.condition_width, True)
    model = Controlled(copies).stand_on(filled(base))
    if random_copies:
        filled(model, seed=9)
    else:
        initialize(model.double(), seed=0)
    return model, base


def inputs(names=("ink",), words=False):
    x, t, y = random((N, 3, SIDE, SIDE), 3), torch.tensor([0, 417, 999]), torch.tensor([0, 3, 1])
    told = {"text": random((N, L, E), 4), "text_mask": masks()} if words else {}
    pictures = {}
    for number, name in enumerate(names):
        picture = np.random.default_rng(number).random((N, 1, 2 * SIDE, 2 * SIDE))
        pictures |= {name: torch.from_numpy(picture), f"{name}_scale": torch.ones(N, 2)}
    return x, t, y, told, pictures


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_at_the_beginning_and_at_scale_0_the_answer_is_the_bases_bit_for_bit(kind, words):
    for random_copies in (False, True):
        model, base = controlled(kind, words=words, random_copies=random_copies)
        x, t, y, told, pictures = inputs(words=words)
        bare = base(x, t, y, **told)
        answer = model(x, t, y, **told, **pictures)
        assert torch.equal(answer, bare) != random_copies
        pictures["ink_scale"] = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.1]])
        rows = [torch.equal(a, b) for a, b in zip(model(x, t, y, **told, **pictures), bare, strict=True)]
        assert rows == [True, not random_copies, True]


def test_a_dits_copy_adds_behind_each_block_of_the_first_half():
    """By hand, from the paper's figure: the copy's blocks on the hint, zero layers, sums."""
    model, base = controlled("dit", random_copies=True)
    x, t, y, _, pictures = inputs()
    pictures["ink_scale"] = torch.tensor([[0.5, 0.25]]).expand(N, 2)
    copy = model.copies["ink"]
    h, c, _ = base.embedded(x, t, y, {})
    g, d, _ = copy.embedded(x, t, y, {})
    g = g + copy.hint(pictures["ink"]).flatten(2).transpose(1, 2)
    assert len(copy.blocks) == len(copy.joins) == 2
    for number, block in enumerate(base.blocks):
        h = block(h, c)
        if number < 2:
            g = copy.blocks[number](g, d)
            weight = (0.5 * 0.25, 0.5)[number]
            h = h + weight * copy.joins[number](g)
    expected = unpatchify(base.final_layer(h, c), base.patch)
    assert torch.allclose(model(x, t, y, **pictures), expected, atol=1e-9)


def test_a_unets_copy_adds_to_each_skip_and_to_the_middle():
    model, base = controlled("unet", random_copies=True)
    x, t, y, _, pictures = inputs()
    copy = model.copies["ink"]
    added = copy(pictures["ink"], x, t, y)
    skips = base.encoded(x, base.context(t, y, None, {}))
    assert [a.shape for a in added] == [s.shape for s in skips]
    middle = skips.pop() + added.pop()
    h, context = middle, base.context(t, y, None, {})
    skips = [s + a for s, a in zip(skips, added, strict=True)]
    for level in base.up:
        for block, attention in zip(level.blocks, level.attentions, strict=True):
            h = block(torch.cat([h, skips.pop()], 1), context.c, None)
            h = attention(h) if isinstance(attention, torch.nn.Identity) else attention(h, None)
        h = level.resample(h) if level.resample is not None else h
    expected = base.conv_out(torch.nn.functional.silu(base.norm_out(h)))
    assert torch.allclose(model(x, t, y, **pictures), expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_pictures_side_by_side_add_up_each_with_its_own_scale(kind):
    model, base = controlled(kind, ("a", "b"), random_copies=True)
    x, t, y, _, both = inputs(("a", "b"))
    none = {name: value if "scale" not in name else torch.zeros(N, 2) for name, value in both.items()}
    alone = [{**none, f"{name}_scale": torch.ones(N, 2)} for name in ("a", "b")]
    assert torch.equal(model(x, t, y, **none), base(x, t, y))
    answers = [model(x, t, y, **one) for one in (*alone, both)]
    assert len({tuple(a.flatten()[:3].tolist()) for a in answers}) == 3
    one_copy = Controlled({"a": model.copies["a"]}).stand_on(base)
    assert torch.equal(one_copy(x, t, y, a=both["a"], a_scale=both["a_scale"]), answers[0])


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_the_base_is_no_part_of_the_module_and_gets_no_gradient(kind):
    model, base = controlled(kind, random_copies=True)
    x, t, y, _, pictures = inputs()
    model.train()
    assert not base.training
    model(x, t, y, **pictures).square().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not {id(p) for p in base.parameters()} & {id(p) for p in model.parameters()}
    assert all(name.startswith("copies.ink.") for name in model.state_dict())


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_a_copy_begins_as_the_base(kind):
    model, base = controlled(kind)
    for name, p in model.copies["ink"].named_parameters():
        if not name.startswith(("hint.", "joins.")):
            assert torch.allclose(p, base.get_parameter(name), atol=1e-6), name
        elif name.startswith(("joins.", "hint.conv_out.")):
            assert not p.any()


@pytest.mark.parametrize("shrink", [1, 2, 3, 8, 12, 16, 32])
def test_a_hint_has_the_size_of_what_it_is_added_to(shrink):
    hint = filled(Hint(3, 5, shrink))
    assert hint(torch.rand(2, 3, 96, 96, dtype=torch.float64)).shape == (2, 5, 96 // shrink, 96 // shrink)
