"""What control pictures are made of: operators on pictures float32 (n, C, S, S) in [0, 1], a row at a time.

Sums of shifted pictures, not convolutions of a library: the same bits in a batch of any size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey (ITU-R BT.601)


def grey(x: Tensor) -> Tensor:
    """(n, 1, S, S)."""
    if x.shape[1] == 1:
        return x
    return sum(weight * x[:, i : i + 1] for i, weight in enumerate(LUMA))


def edges(x: Tensor, amount: Tensor) -> Tensor:
    """1 where the slope of the grey picture exceeds the row's amount (n,), else 0: (n, 1, S, S).

    Sobel's operator, in levels a pixel; beyond the border the picture goes on as it ends.
    """
    padded, (_, _, height, width) = F.pad(grey(x), (1, 1, 1, 1), mode="replicate"), x.shape

    def at(row: int, column: int) -> Tensor:
        return padded[:, :, row : row + height, column : column + width]

    across = at(0, 2) - at(0, 0) + 2 * (at(1, 2) - at(1, 0)) + at(2, 2) - at(2, 0)
    down = at(2, 0) - at(0, 0) + 2 * (at(2, 1) - at(0, 1)) + at(2, 2) - at(0, 2)
    slope = (across.square() + down.square()).sqrt() / 8
    return (slope > amount.to(x.dtype).view(-1, 1, 1, 1)).to(x.dtype)


def blur(x: Tensor, amount: Tensor, largest: float) -> Tensor:
    """Smoothed by a normal of the row's deviation (n,) in pixels, none above `largest`: (n, C, S, S)."""
    reach = min(int(3 * largest + 1), x.shape[-1])
    deviation = amount.to(torch.float64).view(-1, 1)
    places = torch.arange(-reach, reach + 1, dtype=torch.float64, device=x.device)
    weights = torch.exp(-0.5 * (places / deviation).square())  # (n, 2 · reach + 1)
    weights = (weights / weights.sum(1, keepdim=True)).to(x.dtype)[:, :, None, None, None]
    size = x.shape[-1]
    rows = F.pad(x, (0, 0, reach, reach), mode="replicate")
    x = sum(weights[:, i] * rows[:, :, i : i + size] for i in range(2 * reach + 1))
    columns = F.pad(x, (reach, reach, 0, 0), mode="replicate")
    return sum(weights[:, i] * columns[:, :, :, i : i + size] for i in range(2 * reach + 1))


def cells(x: Tensor, grid: int) -> Tensor:
    """The mean of each of grid × grid cells, (n, C, grid, grid)."""
    n, channels, height, width = x.shape
    parts = x.double().view(n, channels, grid, height // grid, grid, width // grid)
    return parts.mean((3, 5)).to(x.dtype)


def low_resolution(x: Tensor, grid: int) -> Tensor:
    """Each of grid × grid cells as its mean, (n, C, S, S)."""
    return _enlarged(cells(x, grid), x.shape[-1])


def mask(x: Tensor, amount: Tensor, grid: int) -> Tensor:
    """Cells 1 whose grey mean exceeds the row's amount (n,), the others 0: (n, 1, S, S)."""
    bright = cells(grey(x), grid) > amount.to(x.dtype).view(-1, 1, 1, 1)
    return _enlarged(bright.to(x.dtype), x.shape[-1])


def _enlarged(x: Tensor, side: int) -> Tensor:
    each = side // x.shape[-1]
    return x.repeat_interleave(each, 2).repeat_interleave(each, 3)
