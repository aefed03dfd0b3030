"""The sections `first_stage`, `conditions` and `objective`: what is trained, what it is told, and how.

Plug-ins bring further ones (`dtrain/plugins.py`): a `PartSection` whose `build(config)` gives the part.
"""

import os
from typing import Any, Literal

from pydantic import field_validator, model_validator

from dtrain.config.autoencoders import described
from dtrain.config.sections import PartSection, Place, Positive
from dtrain.draws import Draw, Purpose


class FirstStageSection(PartSection):
    """Between pixels and what the network sees."""

    @property
    def reads_cache(self) -> bool:
        """Whether the shards hold what the network is to see, and no pictures."""
        return False

    @property
    def is_continuous(self) -> bool:
        """Whether what the network sees has a density, as latents have and 8-bit pixels have not."""
        return False

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees of a picture of these channels and this side."""
        return channels, image_size, image_size


class Pixels(FirstStageSection):
    kind: Literal["pixels"] = "pixels"
    """the network sees the pixels themselves, in [−1, 1]"""


class KL(FirstStageSection):
    kind: Literal["kl"]
    """the network sees latents: what an autoencoder says of each picture, a sample of it drawn anew each epoch"""
    source: Place
    """the folder of a diffusers AutoencoderKL or AutoencoderTiny, as `save_pretrained` writes it"""
    normalise: Literal["published", "dataset"] = "published"
    """latents by the scale and shift in source's config.json, or by mean and deviation of each channel over the data"""
    statistics: Place | None = None
    """of normalise dataset without a cache: the file of `dtrain encode --statistics-only`"""
    cached: bool = False
    """whether the shards hold latents, as `dtrain encode` writes them; else pictures are encoded in each step"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the autoencoder, whatever deepspeed.precision is"""
    block: Positive = 1
    """pictures encoded together; latents of larger blocks are made faster and differ by 1e-6"""
    latent_channels: Positive | None = None
    """null: as source's config.json says; a run keeps it in its own config"""
    downscale: Positive | None = None
    """pixels of a side that become one; null: as source's config.json says; a run keeps it"""

    @model_validator(mode="before")
    @classmethod
    def _shape_of_source(cls, tree: Any) -> Any:
        """What the network's shape follows from is kept with the run, which is read back where `source` is not."""
        if isinstance(tree, dict) and isinstance(tree.get("source"), str):
            shape = {key: tree.get(key) for key in ("latent_channels", "downscale")}
            if None in shape.values():
                found = described(os.path.expanduser(tree["source"]))
                known = {"latent_channels": found.channels, "downscale": found.downscale}
                return tree | {key: known[key] for key, value in shape.items() if value is None}
        return tree

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp16(cls, value: Any) -> Any:
        if value == "fp16":
            raise ValueError("published autoencoders overflow in fp16 (Stable Diffusion XL's does); take fp32 or bf16")
        return value

    @model_validator(mode="after")
    def _consistent(self):
        if self.statistics and (self.cached or self.normalise == "published"):
            why = "a cache has its own" if self.cached else "normalise is published"
            raise ValueError(f"statistics has no effect, because {why}; leave it out")
        return self

    @property
    def reads_cache(self) -> bool:
        return self.cached

    @property
    def is_continuous(self) -> bool:
        return True

    def identity_keys(self) -> list[str]:
        """Where the weights lie may change; what they are is held by their fingerprint."""
        return [key for key in super().identity_keys() if key not in ("source", "statistics")]

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        side, left = divmod(image_size, self.downscale)
        if left:
            raise ValueError(f"data.image_size {image_size} does not divide by {self.downscale}, as first_stage.source")
        return self.latent_channels, side, side

    def draws(self, config: Any) -> list[Draw]:
        return [] if config.is_coupled else [Draw("posterior", Purpose.POSTERIOR, "normal", config.shape)]


class Denoising(PartSection):
    kind: Literal["denoising"] = "denoising"
    """the network learns what noise did to an image; which loss and which times, `diffusion` says"""
