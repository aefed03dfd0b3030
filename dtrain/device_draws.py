"""The numbers of `randomness.Draws` in torch operations, for devices that NumPy does not reach: the same bits.

Philox-4x64-10 (Salmon et al. 2011) as NumPy counts it, in int64 operations that never overflow, and the normals of
`dtrain/normals.py`. Every operation is exact, so eager or compiled makes no difference. On a CPU NumPy's own is faster.
"""

from functools import cache
from math import prod
from typing import NamedTuple

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


class Word(NamedTuple):
    """64 bits: the upper and the lower 32, int64 tensors from 0 to 2^32 − 1."""

    high: Tensor
    low: Tensor


def philox4x64(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Four words of a counter, of shapes that broadcast, and a key of two numbers below 2^64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = _xor(high1, c1, k0), low1, _xor(high0, c3, k1), low0
        k0, k1 = (k0 + _WEYL[0]) % 2**64, (k1 + _WEYL[1]) % 2**64
    return c0, c1, c2, c3


def _product(x: Word, constant: int) -> tuple[Word, Word]:
    """The upper and the lower word of the unsigned product with a constant whose halves are at least 2^31.

    No product and no sum leaves the range of int64, where C++ promises nothing and compilers make use of that: with
    c' = c − 2^32, x c is x c' + 2^32 x, whose upper half is x + (x c' >> 32) and whose lower one is that of x c'.
    """
    high, low = (constant >> 32) - 2**32, (constant & _LOW) - 2**32
    a, b, c, d = x.low * low, x.high * low, x.low * high, x.high * high
    middle = x.low + (a >> 32) + (b & _LOW) + (c & _LOW)
    upper = (d & _LOW) + x.high + (b >> 32) + x.low + (c >> 32) + (middle >> 32)
    return Word(x.high + (d >> 32) + (upper >> 32), upper & _LOW), Word(middle & _LOW, a & _LOW)


def _xor(one: Word, other: Word, number: int) -> Word:
    return Word(one.high ^ other.high ^ (number >> 32), one.low ^ other.low ^ (number & _LOW))


@cache
def _on(device: torch.device) -> _Tables:
    """The tables, brought to the device once."""
    lower, upper = (torch.from_numpy(table).to(device) for table in tables())
    return lower, upper


def _normals(k: Tensor, block: Tensor, seed: int, purpose: int, sub: int, tables: _Tables) -> Tensor:
    """float32 (n, 8·m): the numbers of these blocks, int64 (m,), of each row's stream."""
    lower, upper = tables
    column, row = block[None], k[:, None]
    zero = torch.zeros_like(column[:, :1])
    place = Word((row >> 32) & _LOW, row & _LOW), Word(zero + (sub >> 32), zero + (sub & _LOW)), Word(zero, zero)
    words = philox4x64((Word(zero, column), *place), (seed, purpose))
    halves = [half for word in words for half in (word.low, word.high)]
    return torch.stack([lower[half & 0xFFFF] + upper[half >> 16] for half in halves], -1).flatten(1)


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
            # Counted from 1, as NumPy counts before it computes; out here, as torch.compile multiplies the elements of
            # an arange in 32 bits (torch 2.14, on CPUs).
            block = torch.arange(first + 1, min(first + wide, blocks) + 1, device=k.device)
            made = make(k[row : row + high], block, seed, purpose, sub, _on(k.device))
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
