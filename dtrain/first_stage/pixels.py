"""The pixels themselves, and what every first stage is."""

from typing import Protocol

from torch import Tensor

from dtrain.batch import Batch
from dtrain.data.fields.picture import quantize


class FirstStage(Protocol):
    """Deterministic. The shape of what the network sees, and the fields that this needs, its section declares."""

    fingerprint: str  # of all that determines it, such as a hash of its weights: in the context of every evaluation

    def of_batch(self, batch: Batch) -> Tensor:
        """x_0 float32 (n, C, H, W) of a batch in training."""

    def encode(self, pixels: Tensor) -> Tensor:
        """x_0 (n, C, H, W) of pictures in [−1, 1], (n, channels, image_size, image_size): of a held-out split."""

    def decode(self, x_0: Tensor) -> Tensor:
        """Pictures uint8 (n, channels, image_size, image_size) of what a sampler drew."""


def x_0_of(first_stage: FirstStage, batch: Batch) -> Tensor:
    """x_0 float32 (n, C, H, W) of a batch in training: the first stage's, or what pairs have already drawn."""
    return batch["drawn"] if "drawn" in batch else first_stage.of_batch(batch)


class Pixels:
    """x_0 is the picture in [−1, 1]; what is drawn is rounded to the nearest level."""

    fingerprint = "pixels"

    def of_batch(self, batch: Batch) -> Tensor:
        return batch["image"]

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, x_0: Tensor) -> Tensor:
        return quantize(x_0)
