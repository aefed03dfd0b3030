"""A picture as a condition: a file of each sample, or computed from the image itself, behind its crop and mirroring.

What an image is told are two arguments of the network, `NAME`, float32 (n, c, S, S) in [0, 1], and `NAME_scale`,
float32 (n, 2): what its control is multiplied with, as `models.control` says. Nothing is a scale of 0, the base alone,
the same in training and in sampling.
"""

from functools import partial

import torch
from torch import Tensor

from dtrain.batch import Batch, Condition
from dtrain.conditions import operators
from dtrain.config.conditions import Picture
from dtrain.data.fields.picture import normalize
from dtrain.draws import purpose_of
from dtrain.randomness import Draws

SHALLOWEST = 0.1  # of what the first connection adds in guess mode; the last adds all of it


class Shown:
    """The condition `name` of a section, beside images of these channels and this side."""

    def __init__(self, name: str, section: Picture, channels: int, side: int):
        self.name, self.section = name, section
        self._shape = section.channels(channels), side, side
        self._purpose = purpose_of(f"conditions.{name}.amount")

    def given(self, batch: Batch) -> Condition:
        """batch: of a computed picture the image, float32 in [−1, 1], and the draw of its amount; else the file's."""
        if self.section.operator is None:
            return self._told((batch[self.name] + 1) / 2)
        drawn = batch.get(f"{self.name}_amount")
        return self._told(self.computed((batch["image"] + 1) / 2, drawn))

    def dropped(self, condition: Condition, batch: Batch) -> Condition:
        return self._nulled(condition, batch[f"{self.name}_drop"] < self.section.dropout)

    def null(self, condition: Condition) -> Condition:
        rows = torch.ones(len(condition[self.name]), dtype=torch.bool, device=condition[self.name].device)
        return self._nulled(condition, rows)

    def of_ids(self, ids: list[int], labels: Tensor) -> Condition:
        """No picture: which ones, `of_pictures` is told where there are some."""
        return self.null(self.typical(len(ids), labels.device))

    def of_pictures(self, pictures: Tensor, ids: list[int]) -> Condition:
        """What samples with these ids are told of pictures uint8 (n, C, S, S), each as an image or a file of a sample.

        The amount of a sample is a function of its id. Pictures float32 in [0, 1] are told as they are.
        """
        if pictures.is_floating_point():
            return self._told(pictures)
        return self._told(_levels(pictures) if self.section.operator is None else self.again(pictures, ids))

    def again(self, images: Tensor, ids: list[int]) -> Tensor:
        """What the operator makes of images uint8 (n, C, S, S), with the amounts of the samples `ids`."""
        draws = Draws(0)
        drawn = [draws.uniform(self._purpose, i) for i in ids]
        return self.computed(_levels(images), torch.tensor(drawn, dtype=torch.float64, device=images.device))

    def computed(self, images: Tensor, drawn: Tensor | None) -> Tensor:
        """(n, c, S, S) of images float32 (n, C, S, S) in [0, 1]. drawn: (n,) in [0, 1), where an amount is drawn."""
        section = self.section
        if section.operator == "low_resolution":
            return operators.low_resolution(images, section.grid)
        low, high = section.amount
        amount = low + (high - low) * drawn
        if section.operator == "mask":
            return operators.mask(images, amount, section.grid)
        function = operators.edges if section.operator == "edges" else partial(operators.blur, largest=high)
        return function(images, amount)

    def scaled(self, condition: Condition, scale: float, guess: bool) -> Condition:
        """The same with the control multiplied by `scale`. guess: what is added early is weakened, to a tenth."""
        factors = torch.tensor([scale, SHALLOWEST if guess else 1.0], device=condition[f"{self.name}_scale"].device)
        first = condition[f"{self.name}_scale"][:, :1]  # 0 in rows that are told nothing
        return condition | {f"{self.name}_scale": torch.cat([first * factors[0], factors[1].expand_as(first)], 1)}

    def typical(self, rows: int, device: torch.device | None = None) -> Condition:
        """A stand-in of the shapes that a condition has."""
        return self._told(torch.zeros(rows, *self._shape, device=device))

    def _told(self, pictures: Tensor) -> Condition:
        return {self.name: pictures, f"{self.name}_scale": torch.ones(len(pictures), 2, device=pictures.device)}

    def _nulled(self, condition: Condition, rows: Tensor) -> Condition:
        """The rows of which `rows`, bool (n,), is true, told nothing: no picture, and a scale of 0."""
        pictures, scale = condition[self.name], condition[f"{self.name}_scale"]
        first = scale[:, :1].masked_fill(rows[:, None], 0)
        pictures = pictures.masked_fill(rows[:, None, None, None], 0)
        return {self.name: pictures, f"{self.name}_scale": torch.cat([first, scale[:, 1:]], 1)}


def _levels(pictures: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1], the same bits as of a training's batch."""
    return (normalize(pictures) + 1) / 2
