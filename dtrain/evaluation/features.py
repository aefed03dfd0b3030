"""Feature extractors: from uint8 images to the vectors whose distributions are compared.

An extractor's name goes into the metric's name and its fingerprint into everything cached (design, decision 8).
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtrain.config import Config


class Extractor(Protocol):
    name: str  # as in `fd_<name>`

    @property
    def dimensions(self) -> int:
        """D, the length of a feature vector."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that determines the features of an image: weights, resizing, normalisation."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D), floating point, of images uint8 (N, C, H, W), on the images' device."""


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves in [−1, 1], flattened. Needs no network and sees what a network would not; never a FID."""

    image_size: int
    channels: int
    name = "pixels"

    @property
    def dimensions(self) -> int:
        return self.channels * self.image_size**2

    @property
    def fingerprint(self) -> str:
        definition = f"pixels x/127.5-1 float32 {self.channels}x{self.image_size}x{self.image_size}"
        return hashlib.sha256(definition.encode()).hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        expected = (self.channels, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or images.shape[1:] != expected:
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"pixels wants uint8 images whose (C, H, W) is {expected}, got {got}")
        return images.flatten(1).float() / 127.5 - 1  # (N, C·H·W)


def extractor(name: str, config: Config) -> Extractor:
    """The extractor that `eval.features` names, for the images of this config."""
    assert name == "pixels", name
    return Pixels(config.data.image_size, config.data.channels)


def metric_name(metric: str, features: str) -> str:
    """The journal's key of a metric: `<metric>_<features>`, as `fd_pixels` (design, decision 8)."""
    return f"{metric}_{features}"
