"""Feature extractors: from uint8 images to the vectors whose distributions are compared.

An extractor's name goes into the metric's name and its fingerprint into everything cached (design, decision 8).
"""

import hashlib
import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtrain import distributed, plugins
from dtrain.config import FEATURES
from dtrain.errors import NotFinite
from dtrain.evaluation.features import weights
from dtrain.evaluation.generate import named
from dtrain.evaluation.names import CLEAN
from dtrain.evaluation.names import metric_name as metric_name
from dtrain.evaluation.requirements import Features, check_resize


class Extractor(Features, Protocol):
    @property
    def fingerprint(self) -> str:
        """Hex digest of all that determines the features of an image: weights, resizing, normalisation."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (N, D), of images uint8 (N, C, H, W), on the images' device."""

    def probabilities(self, features: Tensor) -> Tensor:
        """Class probabilities float64 (N, classes) of features (N, D)."""


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves in [−1, 1], flattened. Needs no network and sees what a network would not; never a FID."""

    image_size: int
    channels: int
    name = "pixels"
    classes = 0

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

    def probabilities(self, features: Tensor) -> Tensor:
        raise ValueError("pixels have no classes")


def extractor(
    name: str,
    image_size: int,
    channels: int,
    given: str | None = None,
    device: torch.device | str = "cpu",
    resize: str | None = None,
) -> Extractor:
    """The extractor that a value of `eval.features` stands for; `given` is `eval.weights`, `resize` `eval.resize`.

    A plug-in's is what it registered, called with (image_size, channels, device).

    `auto` is Inception where its file lies on this machine, else EfficientNet-Lite0; it never downloads, while
    `inception` does. Raises UserError for weights that are missing, cut off or others, before anything is computed.
    """
    found = weights.find(weights.INCEPTION, given) if name == "auto" else None
    check_resize(resize, name, name == "inception" or found is not None)
    if name == "pixels":
        return Pixels(image_size, channels)
    if name not in FEATURES and (own := plugins.find("features", name)) is not None:
        return own(image_size, channels, device)
    from dtrain.evaluation.features.networks import EfficientNetLite0, Inception, UserNetwork

    if name == "auto":
        # Without the extra, EfficientNet's error names Inception's file too: either will do.
        return EfficientNetLite0(device) if found is None else Inception(found, device, resize or CLEAN)
    if name == "inception":
        return Inception(weights.obtain(weights.INCEPTION, given), device, resize or CLEAN)
    if name == "effnet_lite0":
        return EfficientNetLite0(device)
    if name == "dinov2":
        from dtrain.evaluation.features.dinov2 import Dinov2

        return Dinov2(given, device)
    return UserNetwork(name, device)


def check_finite(bad: list[int], total: int, what: str, features: str) -> None:
    """Raises NotFinite on every rank where one has `bad` ones (ids, or samples of a split) of `total`. A collective."""
    if found := sorted(itertools.chain(*distributed.gather_objects(bad))):
        raise NotFinite(
            f"the features of {len(found):,} of {total:,} {what} are not finite numbers "
            f"({named(found)}), so there is no distance: "
            f"the network {features} overflows on them; take another eval.features"
        )
