import pytest
import torch

from dtrain.diffusion.guidance import guided
from dtrain.errors import UserError

NULL = 10
x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
t = torch.tensor([1, 500, 999])
labels = torch.tensor([0, 4, 9])


class Model:
    """Depends on every argument of its own row, and counts its rows."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, labels):
        self.rows.append(len(x))
        return torch.tanh(x * (1 + labels.view(-1, 1, 1, 1))) + t.view(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("s", [0.0, 0.5, 1.5, 4.0])
def test_guidance_moves_from_the_unconditional_through_the_conditional_on_all_channels(s):
    model, plain = Model(), Model()
    cond, uncond = plain(x, t, labels), plain(x, t, torch.full_like(labels, NULL))
    torch.testing.assert_close(guided(model, s, NULL)(x, t, labels), (1 - s) * uncond + s * cond, rtol=0, atol=1e-14)
    assert model.rows == [6]


def test_guidance_of_one_is_the_conditional_model_bit_for_bit():
    model = Model()
    assert torch.equal(guided(model, 1.0, NULL)(x, t, labels), Model()(x, t, labels))
    assert model.rows == [3]


def test_guidance_on_a_model_without_classes_is_refused():
    with pytest.raises(UserError, match="num_classes is 0"):
        guided(Model(), 2.0, 0)
    guided(Model(), 1.0, 0)
