"""The critic of latent diffusion's autoencoders: PatchGAN (Isola et al. 2017) with group norms.

Batch norms would make a picture's judgement depend on the micro-batch it came in.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.models.layers import ConditionNetworks, Conv2d
from dtrain.models.unet import group_norm

WIDEST = 8  # widths, of the deepest layers


class PatchCritic(nn.Module):
    """How much each patch looks like one of a picture: (N, patches), of pictures (N, C, H, W).

    width: channels of the first layer; each of `layers` halves the side and doubles them, up to 8 widths.
    """

    initial_value = staticmethod(ConditionNetworks.initial_value)  # biases 0, norms 1, the rest N(0, 0.02²)

    def __init__(self, channels: int, width: int, layers: int):
        super().__init__()
        widths = [width * min(2**i, WIDEST) for i in range(layers + 1)]
        strides = [2] * (layers - 1) + [1]
        self.first = Conv2d(channels, width, 4, stride=2, padding=1)
        self.convolutions = nn.ModuleList(
            Conv2d(before, after, 4, stride=stride, padding=1, bias=False)
            for before, after, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.norms = nn.ModuleList(group_norm(after, math.gcd(32, after // 4)) for after in widths[1:])
        # A bias here would cancel in the hinge loss while no patch is beyond a margin: its gradient would be rounding,
        # of which Adam makes full steps, others at another world size.
        self.last = Conv2d(widths[-1], 1, 4, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x.to(self.first.weight.dtype)), 0.2)  # (N, C, H/2, W/2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = F.leaky_relu(norm(convolution(h)), 0.2)
        return self.last(h).flatten(1).float()
