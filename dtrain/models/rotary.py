"""Rotary positions: queries and keys are turned by their place, so that their products know differences of places alone
(Su et al. 2021), here of rows and of columns.

Shapes: N rows, H heads, T tokens, W channels of a head, a multiple of 4. Channels 2i and 2i + 1 are a pair; the first
half of the pairs turns with a token's row, the second with its column.
"""

import torch
from torch import Tensor


def rotations(side: int, head: int, before: int, like: Tensor) -> Tensor:
    """cos and sin of each token's angles, for a head of W channels: (2, before + side², W/2), at least float32.

    The tokens of a side × side grid come row by row, place · 10000^(−i/(W/4)) each; the `before` tokens in front of
    them have no place and are not turned. like: its device, and its dtype where that is finer.
    """
    dtype = torch.promote_types(torch.float32, like.dtype)
    place = torch.arange(side, dtype=dtype, device=like.device)
    i = torch.arange(head // 4, dtype=dtype, device=like.device)
    angles = place[:, None] * 10000 ** (-i / (head // 4))  # (side, W/4)
    row = angles[:, None].expand(-1, side, -1)  # (row, column, W/4)
    column = angles[None].expand(side, -1, -1)  # (row, column, W/4)
    turned = torch.cat([row, column], dim=2).flatten(0, 1)  # (side², W/2)
    turned = torch.cat([turned.new_zeros(before, head // 2), turned])  # (before + side², W/2)
    return torch.stack([turned.cos(), turned.sin()])


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Each pair of channels of x (N, H, T, W) turned by its token's angle, in x's dtype; rotation (2, T, W/2)."""
    cos, sin = rotation  # (T, W/2) each
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (N, H, T, W/2) each
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)
