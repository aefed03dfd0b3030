"""The sections of a perceptual distance: of an autoencoder's `objective`, and of a flow that draws in one step."""

from typing import Annotated, Literal

from pydantic import Field

from dtrain.config.sections import IdentitySection, NonNegativeFloat, Place

SMALLEST = {"lpips": 16, "effnet_lite0": 32}  # pixels a side that a network's halvings leave one of


class LPIPS(IdentitySection):
    kind: Literal["lpips"]
    """distance of VGG16's features, weighted as people see differences (Zhang et al. 2018)"""
    file: Place
    """state dict of torchvision's VGG16 and LPIPS' linear weights together, .safetensors or torch.save's"""
    weight: NonNegativeFloat = 1.0
    """beside the error of the picture, which is the mean over its elements"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the network, whatever deepspeed.precision is"""

    def identity_keys(self) -> list[str]:
        """Where the weights lie may change; what they are is held by their fingerprint."""
        return [key for key in super().identity_keys() if key != "file"]


class EfficientNetLite0(IdentitySection):
    kind: Literal["effnet_lite0"]
    """distance of EfficientNet-Lite0's features at the picture's own size, all channels alike; no LPIPS"""
    weight: NonNegativeFloat = 1.0
    """beside the error of the picture, which is the mean over its elements"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the network, whatever deepspeed.precision is"""


Perceptual = Annotated[LPIPS | EfficientNetLite0, Field(discriminator="kind")]


def check(section: LPIPS | EfficientNetLite0, key: str, image_size: int) -> None:
    """Raises ValueError where pictures of this side are too small for the network of `key`."""
    if image_size < (least := SMALLEST[section.kind]):
        raise ValueError(
            f"data.image_size {image_size} is too small for {key} {section.kind}, which takes {least} and more"
        )
