"""The `objective` section of an autoencoder's training."""

from typing import Any, ClassVar, Literal

from dtrain.config.sections import NonNegativeFloat, PartSection
from dtrain.draws import Draw, Purpose


class Autoencoding(PartSection):
    kind: Literal["autoencoding"]
    """an autoencoder learns to give back the picture, through a Gaussian over latents"""
    reconstruction: Literal["l1", "l2"] = "l1"
    """error of the picture: absolute or squared, summed over its pixels"""
    kl_weight: NonNegativeFloat = 1e-6
    """of the posterior's divergence from N(0, I), summed over the latent; tiny: the latents have no prior to sample"""
    diffuses: ClassVar[bool] = False

    def draws(self, config: Any) -> list[Draw]:
        f = config.model.downscale
        shape = config.model.latent_channels, config.data.image_size // f, config.data.image_size // f
        return [Draw("posterior", Purpose.POSTERIOR, "normal", shape)]
