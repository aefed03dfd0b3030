"""What every condition is."""

from typing import Protocol

from torch import Tensor

from dtrain.batch import Batch, Condition


class Conditioning(Protocol):
    """One thing that a network is told: the class, a sentence, a picture.

    Its `Condition`s are arguments of the network's forward by name, tensors (n, …), a row an image. Which fields and
    draws it needs of a batch, its section declares (`config.sections.PartSection`).
    """

    def given(self, batch: Batch) -> Condition:
        """What the rows of a batch are told, before any is dropped."""

    def dropped(self, condition: Condition, batch: Batch) -> Condition:
        """The same with a share of the rows told nothing, by a draw of each row: so that guidance works."""

    def null(self, condition: Condition) -> Condition:
        """The same rows told nothing: in training and in sampling the same thing."""

    def of_ids(self, ids: list[int], labels: Tensor) -> Condition:
        """What samples are told. ids (n): of images to be generated; labels int64 (n,): their classes, 0 for none."""
