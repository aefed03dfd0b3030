"""The `objective` section of an autoencoder's training."""

from typing import Any, ClassVar, Literal

from dtrain.config.critics import Critic
from dtrain.config.perceptual import Perceptual
from dtrain.config.perceptual import check as check_perceptual
from dtrain.config.sections import NonNegative, NonNegativeFloat, PartSection, Positive
from dtrain.draws import Draw, Purpose


class OfPatches(Critic):
    from_step: NonNegative = 0
    """steps without it, until what comes back is worth judging"""
    weight: NonNegativeFloat = 0.5
    """of its judgement, scaled to pull at the decoder's last layer as hard as the error of the picture does"""
    layers: Positive = 3
    """halvings of the side; each doubles the channels, up to 8 widths"""


class Autoencoding(PartSection):
    kind: Literal["autoencoding"]
    """an autoencoder learns to give back the picture, through a Gaussian over latents"""
    reconstruction: Literal["l1", "l2"] = "l1"
    """error of the picture: absolute or squared, summed over its pixels"""
    kl_weight: NonNegativeFloat = 1e-6
    """of the posterior's divergence from N(0, I), summed over the latent; tiny: the latents have no prior to sample"""
    perceptual: Perceptual | None = None
    """a distance of a frozen network's features beside the error of the picture; null: none"""
    critic: OfPatches | None = None
    """a second network learns to tell patches of pictures from what came back (PatchGAN); null: none"""
    diffuses: ClassVar[bool] = False

    def check(self, image_size: int) -> None:
        """Raises ValueError where a part does not fit pictures of this side."""
        if self.perceptual is not None:
            check_perceptual(self.perceptual, "objective.perceptual", image_size)
        if self.critic is not None and image_size >> self.critic.layers < 3:  # two convolutions take a pixel each
            layers = f"objective.critic.layers {self.critic.layers}"
            raise ValueError(f"{layers} leaves no patch of data.image_size {image_size}; take less")

    @property
    def file_of_weights(self) -> str | None:
        return getattr(self.perceptual, "file", None)

    def draws(self, config: Any) -> list[Draw]:
        f = config.model.downscale
        shape = config.model.latent_channels, config.data.image_size // f, config.data.image_size // f
        return [Draw("posterior", Purpose.POSTERIOR, "normal", shape)]
