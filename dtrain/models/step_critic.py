"""The critic of a chain's step: does x_{t−1} come from data, or from the generator (Xiao et al. 2022)?

Convolutions, because its loss differentiates a gradient (R1), which fused attention does not support. No norms that
mix rows: a picture's judgement would depend on the micro-batch it came in.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.models.layers import Conv2d, LabelEmbedder, Linear, TimestepEmbedder, normal, xavier_uniform

WIDEST = 8  # widths, of the deepest layers
SMALLEST = 4  # pixels a side that it halves down to
SLOPE = 0.2  # of what is below 0


class Halving(nn.Module):
    """Two convolutions that are told the time, and a way past them; both halve the side."""

    def __init__(self, channels: int, out: int, told: int):
        super().__init__()
        self.conv1 = Conv2d(channels, out, 3, padding=1)
        self.condition = Linear(told, out)
        self.conv2 = Conv2d(out, out, 3, padding=1)
        self.skip = Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(x, SLOPE)) + self.condition(F.silu(c))[:, :, None, None]  # (N, out, H, W)
        h = F.avg_pool2d(self.conv2(F.leaky_relu(h, SLOPE)), 2)
        return (h + self.skip(F.avg_pool2d(x, 2))) / math.sqrt(2)  # (N, out, H/2, W/2)


class StepCritic(nn.Module):
    """Scores (N,) of x_{t−1} (N, C, H, W), beside x_t and t, and the class y by an inner product with the features
    (Miyato & Koyama 2018). width: channels of the first layer; each halving doubles them, up to 8 widths.

    alone: a chain of one step, whose x_t is noise and tells nothing: it is not seen.
    """

    def __init__(self, side: int, channels: int, width: int, num_classes: int, alone: bool):
        super().__init__()
        self.alone, self.num_classes = alone, num_classes
        halvings = max(1, (side // SMALLEST).bit_length() - 1)
        widths = [width * min(2**i, WIDEST) for i in range(halvings + 1)]
        told = 4 * width
        self.t_embedder = TimestepEmbedder(told)
        self.conv_in = Conv2d(channels if alone else 2 * channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(Halving(*pair, told) for pair in pairwise(widths))
        self.hidden = Linear(widths[-1] * (side >> halvings) ** 2, widths[-1])
        # A bias would cancel while real and drawn score alike: its gradient would be rounding, of which Adam makes
        # full steps, others at another world size.
        self.last = Linear(widths[-1], 1, bias=False)
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, widths[-1])

    def forward(self, x: Tensor, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x, x_t (N, C, H, W) of any float dtype, t (N,), y int64 (N,) → float32 (N,)."""
        dtype = self.conv_in.weight.dtype
        seen = x if self.alone else torch.cat([x, x_t.to(x.dtype)], dim=1)
        h, c = self.conv_in(seen.to(dtype)), self.t_embedder(t)
        for block in self.blocks:
            h = block(h, c)
        h = F.leaky_relu(self.hidden(F.leaky_relu(h, SLOPE).flatten(1)), SLOPE)  # (N, widest)
        score = self.last(h)[:, 0]
        if self.num_classes:
            score = score + (self.y_embedder(y) * h).sum(1)
        return score.float()

    @staticmethod
    def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """What the parameter called `name` begins as: biases 0, embeddings small, the rest by Glorot's law."""
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if "_embedder." in name:
            return normal(name, shape, seed, std=0.02)
        return xavier_uniform(name, shape, seed, fan_out=shape[0] * math.prod(shape[2:]))
