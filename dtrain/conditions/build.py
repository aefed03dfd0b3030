"""The conditions a configuration asks for, side by side."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

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


def typical_forward(model: nn.Module, config: Config, rows: int, training: bool = True) -> Callable[[], Tensor]:
    """A forward pass of the backbone on zeros of the shapes that it gets, on the default device: to count its cost."""
    x = torch.zeros(rows, *config.shape)
    if config.model.name == "kl_autoencoder":
        noise = torch.zeros(rows, model.latent_channels, *(side // model.downscale for side in x.shape[2:]))
        return lambda: model(x, noise).pixels
    condition = build(config).of_ids(list(range(rows)), torch.zeros(rows, dtype=torch.long))
    draws = config.model.draws() if training else {}
    drawn = {argument: torch.zeros(rows, dtype=torch.long) for argument in draws}
    return partial(model, x, torch.zeros(rows), **condition, **drawn)
