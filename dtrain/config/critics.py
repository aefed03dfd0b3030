"""The networks that are trained against a model: how large they are, and how their optimizer differs."""

from typing import Annotated

from pydantic import Field

from dtrain.config.sections import IdentitySection
from dtrain.config.training import Optim


class Critic(IdentitySection):
    width: Annotated[int, Field(gt=0, multiple_of=4)] = 64
    """channels of its first layer"""
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
