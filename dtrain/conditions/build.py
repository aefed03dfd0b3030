"""The conditions a configuration asks for, side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dtrain.batch import Batch, Condition
from dtrain.conditions.classes import Classes
from dtrain.conditions.condition import Conditioning
from dtrain.config import Config


class Conditions:
    """Several conditions as one: each keeps to its own arguments, and each is dropped by its own draw."""

    def __init__(self, parts: Sequence[Conditioning] = ()):
        self._parts = list(parts)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def of_batch(self, batch: Batch) -> Condition:
        """What the rows of a batch are told in training, a share of them nothing."""
        condition: Condition = {}
        for part in self._parts:
            condition |= part.dropped(part.given(batch), batch)
        return condition

    def null(self, condition: Condition) -> Condition:
        """The same rows told nothing. An argument that is no condition's stays as it is."""
        nothing = dict(condition)
        for part in self._parts:
            nothing |= part.null(condition)
        return nothing

    def of_ids(self, ids: list[int], labels: Tensor) -> Condition:
        """What samples are told; see `Conditioning.of_ids`."""
        condition: Condition = {}
        for part in self._parts:
            condition |= part.of_ids(ids, labels)
        return condition


def build(config: Config) -> Conditions:
    """The class where `model.num_classes` > 0, then those of `conditions`."""
    parts: list[Conditioning] = []
    if config.model.num_classes:
        parts.append(Classes(config.model.num_classes, config.diffusion.label_dropout))
    return Conditions([*parts, *(section.build(config) for section in config.conditions.values())])


def typical_inputs(config: Config, rows: int) -> tuple[Tensor, Tensor, Condition]:
    """(x_t, time, condition) of the shapes that the backbone gets, on the default device: to count what it costs."""
    labels = torch.zeros(rows, dtype=torch.long)
    return torch.zeros(rows, *config.shape), torch.zeros(rows), build(config).of_ids(list(range(rows)), labels)
