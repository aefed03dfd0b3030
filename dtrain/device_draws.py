"""The numbers of `randomness.Draws` in torch operations, for devices that NumPy does not reach: the same bits.

Philox-4x64-10 (Salmon et al. 2011) as NumPy counts it, in int64 arithmetic modulo 2^64, and the normals of
`dtrain/normals.py`. Every operation is exact, so eager or compiled makes no difference. On a CPU NumPy's own is faster.
"""

from functools import cache
from math import prod

import torch
from torch import Tensor

from dtrain.normals import tables
from dtrain.randomness import Draws

_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_LOW = 0xFFFFFFFF
_ROUNDS = 10
_Tables = tuple[Tensor, Tensor]
_NUMBERS = 8  # of a block of four words
_MOST_BLOCKS = 1 << 20  # at a time: 8 MiB an intermediate tensor, which a GPU's cache holds


def philox4x64(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of a counter and a key below 2^64: int64 tensors of shapes that broadcast, read as unsigned."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ _signed(k0), low1, high0 ^ c3 ^ _signed(k1), low0
        k0, k1 = (k0 + _WEYL[0]) % 2**64, (k1 + _WEYL[1]) % 2**64
    return c0, c1, c2, c3


def _product(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 64 bits of the unsigned product, by halves of 32 bits."""
    high, low = constant >> 32, constant & _LOW
    x_high, x_low = _upper(x), x & _LOW
    middle = x_high * low + _upper(x_low * low)
    other = x_low * high + (middle & _LOW)
    return x_high * high + _upper(middle) + _upper(other), x * _signed(constant)


def _upper(x: Tensor) -> Tensor:
    """The upper 32 bits: torch's shift brings the sign down."""
    return (x >> 32) & _LOW


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


@cache
def _on(device: torch.device) -> _Tables:
    """The tables, brought to the device once."""
    lower, upper = (torch.from_numpy(table).to(device) for table in tables())
    return lower, upper


def _normals(k: Tensor, first: int, blocks: int, seed: int, purpose: int, sub: int, tables: _Tables) -> Tensor:
    """float32 (n, 8·blocks): the numbers of the blocks from `first` on of each row's stream."""
    lower, upper = tables
    block = torch.arange(first + 1, first + blocks + 1, device=k.device)[None]  # NumPy counts before it computes
    nothing = torch.zeros_like(block[:, :1])
    words = philox4x64((block, k[:, None], nothing + sub, nothing), (seed, purpose))
    numbers = [
        lower[(word >> shift) & 0xFFFF] + upper[(word >> (shift + 16)) & 0xFFFF] for word in words for shift in (0, 32)
    ]
    return torch.stack(numbers, -1).flatten(1)


def normals(seed: int, purpose: int, k: Tensor, shape: tuple[int, ...], sub: int = 0, compiled: bool = False) -> Tensor:
    """float32 (n, *shape) on k's device, for k int64 (n,): what `Draws(seed, 2).normals` gives, bit for bit.

    compiled: by torch.compile, whose one kernel writes nothing in between.
    """
    numel = prod(shape)
    blocks = -(-numel // _NUMBERS)
    values = torch.empty((len(k), numel), dtype=torch.float32, device=k.device)
    make = _compiled() if compiled else _normals
    wide = blocks if compiled else min(blocks, _MOST_BLOCKS)
    high = len(k) if compiled else max(1, _MOST_BLOCKS // wide)
    for row in range(0, len(k), high):
        for first in range(0, blocks, wide):
            part = values[row : row + high, first * _NUMBERS : (first + wide) * _NUMBERS]
            made = make(k[row : row + high], first, min(wide, blocks - first), seed, purpose, sub, _on(k.device))
            part.copy_(made[:, : part.shape[1]])
    return values.view(len(k), *shape)


def normals_on(
    draws: Draws, purpose: int, k: Tensor, shape: tuple[int, ...], sub: int = 0, compiled: bool = False
) -> Tensor:
    """What `draws.normals` gives for k int64 (n,), on k's device: made there where the generator is the same there."""
    if k.device.type != "cpu" and draws.generator == 2:
        return normals(draws.seed, purpose, k, shape, sub, compiled)
    drawn = torch.from_numpy(draws.normals(purpose, k.tolist(), shape, sub))
    if k.device.type == "cpu":
        return drawn
    return drawn.pin_memory().to(k.device, non_blocking=True)


@cache
def _compiled():
    return torch.compile(_normals, dynamic=False)
