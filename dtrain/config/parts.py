"""The sections `first_stage`, `conditions` and `objective`: what is trained, what it is told, and how.

Plug-ins bring further ones (`dtrain/plugins.py`): a `PartSection` whose `build(config)` gives the part.
"""

from typing import Literal

from dtrain.config.sections import PartSection


class FirstStageSection(PartSection):
    """Between pixels and what the network sees."""

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees of a picture of these channels and this side."""
        return channels, image_size, image_size


class Pixels(FirstStageSection):
    kind: Literal["pixels"] = "pixels"
    """the network sees the pixels themselves, in [−1, 1]"""


class Denoising(PartSection):
    kind: Literal["denoising"] = "denoising"
    """the network learns what noise did to an image; which loss and which times, `diffusion` says"""
