"""Waves of a pixel's value as further channels, with which a network sees less than a grey level of noise.

sin(2ⁿ π z) and cos(2ⁿ π z) of n 7 and 8 have periods of two grey levels and of one (Kingma et al. 2021, appendix C).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = 256  # of an 8-bit pixel; in [−1, 1] they are 2/255 apart, and the waves are of 2/256


def with_waves(x: Tensor, octaves: Sequence[int]) -> Tensor:
    """x (N, C, H, W) and behind it sin and cos of each octave: (N, C + 2·C·len(octaves), H, W), in at least float32.

    Without octaves x itself. In bfloat16 a phase would be wrong by whole periods.
    """
    if not octaves:
        return x
    x = x.to(torch.promote_types(torch.float32, x.dtype))
    z = x * ((LEVELS - 1) / LEVELS * math.pi)
    phases = torch.cat([2**n * z for n in octaves], dim=1)  # (N, C·len(octaves), H, W)
    return torch.cat([x, phases.sin(), phases.cos()], dim=1)


def channels_with_waves(channels: int, octaves: Sequence[int]) -> int:
    """How many `with_waves` makes of so many."""
    return channels * (1 + 2 * len(octaves))
