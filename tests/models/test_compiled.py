"""Blocks compiled where they stand: the same numbers, names and weights as uncompiled ones."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from dtrain.models import DiT, UNet
from dtrain.models.compiled import BLOCKS, compile_blocks
from dtrain.models.mmdit import MMDiT
from dtrain.models.text import TextNetwork

WORDS = {
    "text": torch.arange(4 * 5 * 6).view(4, 5, 6).sin(),
    "text_mask": torch.arange(5) < torch.tensor([[5], [1], [3], [2]]),
}


def mmdit():
    model = MMDiT(image_size=8, channels=3, patch=2, width=16, depth=3, heads=2, num_classes=10)
    model.conditions["text"] = TextNetwork(None, 6, 16, False)
    return model


MODELS = {
    "mmdit": mmdit,
    "dit": lambda: DiT(image_size=8, channels=3, patch=2, width=16, depth=3, heads=2, num_classes=10, learn_sigma=True),
    "jit": lambda: DiT(
        8, 3, 2, 16, 3, 2, 10, norm="rms", mlp="swiglu", rotary=True, bottleneck=6, context_tokens=2, context_from=1
    ),
    "unet": lambda: UNet(8, 3, 8, [1, 2], 1, [4], 10, scale_shift=True, dropout=0.3),
}


def with_gradients(model, checkpointing):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():  # zeros would hide a block
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    model.train().activation_checkpointing = checkpointing
    x = torch.randn(4, 3, 8, 8, generator=generator)
    more = {UNet: {"keys": torch.arange(4) * 0x1234567}, MMDiT: WORDS}.get(type(model), {})
    out = model(x, torch.tensor([0, 3, 500, 999]), torch.tensor([0, 1, 2, 10]), **more)
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "aot_eager") for name in MODELS),  # traces forward and backward as inductor does, writes no C++
        *(pytest.param(name, "inductor", marks=pytest.mark.campaign) for name in MODELS),
    ],
)
def test_compiled_blocks_compute_what_eager_ones_do(name, backend):
    torch._dynamo.reset()
    counters.clear()
    model = MODELS[name]()
    compiled = copy.deepcopy(model)
    compile_blocks([compiled], backend=backend)
    assert list(compiled.state_dict()) == list(model.state_dict())
    blocks = [block for block in compiled.modules() if isinstance(block, BLOCKS)]
    assert len(blocks) >= 3
    for checkpointing in (False, True):
        out, grads = with_gradients(compiled, checkpointing)
        expected, expected_grads = with_gradients(model, checkpointing)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert grads.keys() == expected_grads.keys()
        for one in grads:
            torch.testing.assert_close(grads[one], expected_grads[one], rtol=1e-4, atol=1e-5)
        compiled.zero_grad()
        model.zero_grad()
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["unimplemented"], dict(counters["unimplemented"])
