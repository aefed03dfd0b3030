"""Conditions side by side: each with its own arguments and its own dropout, null alike in training and in sampling."""

import torch

from dtrain.conditions.build import Conditions
from dtrain.conditions.classes import Classes
from dtrain.diffusion.guidance import guided
from dtrain.randomness import Draws, Purpose

N = 2000


class Height:
    """A number a row, dropped by its own draw; told nothing it is −1."""

    def given(self, batch):
        return {"height": batch["height"]}

    def dropped(self, condition, batch):
        return {"height": condition["height"].masked_fill(batch["height_drop"] < 0.3, -1.0)}

    def null(self, condition):
        return {"height": torch.full_like(condition["height"], -1.0)}

    def of_ids(self, ids, labels):
        return {"height": torch.tensor([i / 10 for i in ids])}


both = Conditions([Classes(10, dropout=0.2), Height()])


def batch():
    draws = Draws(0)
    return {
        "label": torch.arange(N) % 10,
        "height": torch.ones(N),
        "drop": torch.tensor([draws.uniform(Purpose.LABEL_DROP, k) for k in range(N)], dtype=torch.float64),
        "height_drop": torch.tensor([draws.uniform(Purpose.CROP, k) for k in range(N)], dtype=torch.float64),
    }


def test_each_is_dropped_by_its_own_draw_so_that_all_four_cases_are_trained():
    condition = both.of_batch(batch())
    without_class, without_height = condition["y"] == 10, condition["height"] == -1
    shares = [
        (without_class & without_height).double().mean(),
        (without_class & ~without_height).double().mean(),
        (~without_class & without_height).double().mean(),
    ]
    for share, expected in zip(shares, (0.06, 0.14, 0.24), strict=True):
        assert abs(share - expected) < 4 * (expected / N) ** 0.5


def test_what_is_dropped_in_training_is_what_guidance_calls_nothing():
    """A model that is linear in both gives uncond + s·(cond − uncond), uncond with both nulls."""

    def model(x, t, y, height):
        return x + y.view(-1, 1, 1, 1) + 100 * height.view(-1, 1, 1, 1)

    x, t = torch.zeros(2, 1, 2, 2), torch.tensor([1, 2])
    condition = both.of_ids([3, 7], torch.tensor([4, 5]))
    found = guided(model, 3.0, both.null)(x, t, **condition)
    for row, (label, height) in enumerate(((4, 0.3), (5, 0.7))):
        conditional, nothing = label + 100 * height, 10 + 100 * -1.0
        assert torch.allclose(found[row], torch.tensor(nothing + 3 * (conditional - nothing)))


def test_an_argument_that_is_no_conditions_is_not_nulled():
    condition = both.of_ids([1], torch.tensor([2])) | {"r": torch.tensor([0.5])}
    assert both.null(condition)["r"] is condition["r"]


def test_a_model_without_conditions_is_called_without():
    assert Conditions().of_batch(batch()) == {}
    assert not Conditions()
