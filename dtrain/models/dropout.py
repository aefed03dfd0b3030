"""Dropout whose mask is a pure function of (seed, k, layer, element).

So it is the same on CPUs and GPUs, at any world size, in any micro-batch, and again when activations are recomputed.

torch's generators differ between devices and depend on what was drawn before. Here each image of the run brings a
64-bit key, and an integer hash of (key, layer, element) decides; only 32-bit multiplications and shifts are needed.
"""

import torch
from torch import Tensor

BITS = 31  # of the hash that are compared with the probability


def dropout(x: Tensor, probability: float, keys: Tensor, layer: int) -> Tensor:
    """x (N, …) with each element 0 with the given probability, else divided by 1 − probability; keys int64 (N,)."""
    element = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device)[None]  # (1, elements of a row)
    low = _mixed((keys & 0x7FFFFFFF).to(torch.int32) ^ _mixed(torch.full_like(keys, layer + 1, dtype=torch.int32)))
    high = ((keys >> 32) & 0x7FFFFFFF).to(torch.int32)
    hashed = _mixed(_mixed(element ^ low[:, None]) + high[:, None])
    keep = (hashed & 0x7FFFFFFF) >= int(probability * 2**BITS)
    return torch.where(keep.view_as(x), x / (1 - probability), 0)


def _mixed(h: Tensor) -> Tensor:
    """A bijection of 32 bits in which every output bit depends on every input bit (a multiply-xorshift finaliser)."""
    h = (h ^ _shifted(h, 16)) * 0x7FEB352D
    h = (h ^ _shifted(h, 15)) * -0x7B935975  # 0x846CA68B as a signed number
    return h ^ _shifted(h, 16)


def _shifted(h: Tensor, places: int) -> Tensor:
    """To the right, zeros from the left."""
    return (h >> places) & ((1 << (32 - places)) - 1)
