"""A network in bf16: statistics of norms in fp32, all else in bf16, so that what is modulated is half the bytes."""

import pytest
import torch
import torch.nn.functional as F

from dtrain.models import DiT, UNet

SHAPES = {"layer": (4, 64, 384), "rms": (4, 64, 64), "group": (4, 64, 8, 8)}


def norm(kind: str, x: torch.Tensor) -> torch.Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return F.group_norm(x, 32, eps=1e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("kind", SHAPES)
def test_norms_of_bf16_take_their_statistics_in_more(kind, device):
    """A mean far from 0, which a sum in bf16 would miss by 0.06, and a variance, which it would miss by as much."""
    x = (torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(0)) * 3 + 20).bfloat16().to(device)
    found = norm(kind, x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), norm(kind, x.double()), rtol=2**-8, atol=1e-4)


MODELS = {
    "dit": lambda: DiT(8, 3, 2, 32, 2, 2, 10, qk_norm=True),
    "unet": lambda: UNet(8, 3, 32, [1, 2], 1, [4], 10),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_bf16_network_answers_in_bf16(name):
    model, found = MODELS[name]().bfloat16(), {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: found.update({name: out.dtype}))
    model(torch.randn(2, 3, 8, 8), torch.tensor([999, 3]), torch.tensor([1, 10]))
    assert len(found) > 20
    assert set(found.values()) == {torch.bfloat16}
