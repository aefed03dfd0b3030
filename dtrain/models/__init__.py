"""The backbones, DiT, MMDiT and UNet, and how their weights begin.

DiT and UNet come from here with initial weights, those of their own modules are only allocated:

    from dtrain.models import DiT

    model = DiT(image_size=32, channels=3, patch=2, width=384, depth=12, heads=6, num_classes=10)

`build` makes the one that a configuration asks for.
"""

import functools

from dtrain.models import dit, unet
from dtrain.models.layers import initialize


class DiT(dit.DiT):
    """`dit.DiT` with initial weights: float32, a function of `seed` and each parameter's name."""

    @functools.wraps(dit.DiT.__init__)
    def __init__(self, *sizes, seed: int = 0, **more):
        super().__init__(*sizes, **more)
        initialize(self, seed)


class UNet(unet.UNet):
    """`unet.UNet` with initial weights: float32, a function of `seed` and each parameter's name."""

    @functools.wraps(unet.UNet.__init__)
    def __init__(self, *sizes, seed: int = 0, **more):
        super().__init__(*sizes, **more)
        initialize(self, seed)
