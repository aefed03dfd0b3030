"""The class label as a condition: `model.num_classes` > 0, dropped by `diffusion.label_dropout`."""

import torch
from torch import Tensor

from dtrain.batch import Batch, Condition


class Classes:
    """The argument `y` of a network, int64 (n,); the null label follows the classes and is their number."""

    def __init__(self, num_classes: int, dropout: float):
        self._null, self._dropout = num_classes, dropout

    def given(self, batch: Batch) -> Condition:
        return {"y": batch["label"]}

    def dropped(self, condition: Condition, batch: Batch) -> Condition:
        drop = batch["drop"] < self._dropout
        return {"y": torch.where(drop, self._null, condition["y"])}

    def null(self, condition: Condition) -> Condition:
        return {"y": torch.full_like(condition["y"], self._null)}

    def of_ids(self, ids: list[int], labels: Tensor) -> Condition:
        return {"y": labels}
