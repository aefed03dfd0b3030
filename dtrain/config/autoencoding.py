"""The `objective` section of an autoencoder's training."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dtrain.config.perceptual import Perceptual
from dtrain.config.perceptual import check as check_perceptual
from dtrain.config.sections import IdentitySection, NonNegative, NonNegativeFloat, PartSection, Positive
from dtrain.config.training import Optim
from dtrain.draws import Draw, Purpose


class Critic(IdentitySection):
    from_step: NonNegative = 0
    """steps without it, until what comes back is worth judging"""
    weight: NonNegativeFloat = 0.5
    """of its judgement, scaled to pull at the decoder's last layer as hard as the error of the picture does"""
    width: Annotated[int, Field(gt=0, multiple_of=4)] = 64
    """channels of its first layer"""
    layers: Positive = 3
    """halvings of the side; each doubles the channels, up to 8 widths"""
    lr: Annotated[float, Field(gt=0)] | None = None
    """learning rate of its own optimizer, which is else as `optim` says; null: optim.lr"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    """Adam's, of its own optimizer; null: optim.betas"""

    def identity_keys(self) -> list[str]:
        return [key for key in super().identity_keys() if key not in ("lr", "betas")]

    def optim(self, backbone: Optim) -> Optim:
        """The settings of its turn. backbone: the `optim` section."""
        own = {"lr": self.lr, "betas": self.betas}
        return backbone.model_copy(update={key: value for key, value in own.items() if value is not None})


class Autoencoding(PartSection):
    kind: Literal["autoencoding"]
    """an autoencoder learns to give back the picture, through a Gaussian over latents"""
    reconstruction: Literal["l1", "l2"] = "l1"
    """error of the picture: absolute or squared, summed over its pixels"""
    kl_weight: NonNegativeFloat = 1e-6
    """of the posterior's divergence from N(0, I), summed over the latent; tiny: the latents have no prior to sample"""
    perceptual: Perceptual | None = None
    """a distance of a frozen network's features beside the error of the picture; null: none"""
    critic: Critic | None = None
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
