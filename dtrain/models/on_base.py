"""What trained weights that stand on a frozen network have in common."""

from typing import Self

from torch import nn


class OnBase(nn.Module):
    """Its parameters are the trained ones alone.

    The base is no part of the module: no optimizer, engine, state or checkpoint knows its weights. `stand_on` gives it.
    """

    def __init__(self):
        super().__init__()
        self._beside: tuple[nn.Module, ...] = ()  # in a tuple, where modules and DeepSpeed do not see it

    def stand_on(self, base: nn.Module) -> Self:
        """Give the base, on the device where it is called. From here on it is frozen and in eval mode."""
        self._beside = (base.eval().requires_grad_(False),)
        return self

    @property
    def base(self) -> nn.Module:
        assert self._beside, "a network on a base is called before it has it"
        return self._beside[0]
