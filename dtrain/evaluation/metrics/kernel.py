"""Kernel distance (KID): the squared maximum mean discrepancy under a cubic kernel, averaged over random subsets.

Bińkowski, Sutherland, Arbel & Gretton (2018), "Demystifying MMD GANs". Unbiased at any count, so it may be negative.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtrain.evaluation.metrics.subsets import KERNEL_REFERENCE, KERNEL_SAMPLES, Subsets

SUBSETS, SUBSET_SIZE = 100, 1000  # the paper's and everybody's
TILE = 512  # rows and columns of the kernel matrix made at a time: 2 MiB, which a core's cache holds


class Spread(NamedTuple):
    mean: float
    std: float  # over subsets, which share samples: not the error of the mean


def kernel_distance(
    features: Tensor, reference: Tensor, seed: int, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> Spread:
    """KID of features (N, D) and (M, D), mean and standard deviation over seeded subsets.

    A subset has `subset_size` rows of each, or all of the smaller set. Needs N, M ≥ 2.
    """
    rows, n, m = Subsets(seed), len(features), len(reference)
    size = min(subset_size, n, m)
    x = [rows.choose(n, size, i, KERNEL_SAMPLES) for i in range(subsets)]
    y = [rows.choose(m, size, i, KERNEL_REFERENCE) for i in range(subsets)]
    if (n + m) ** 2 <= subsets * (2 * size) ** 2:  # subsets overlap: each pair once is less than each subset's pairs
        values = squared_mmds(features, reference, _members(x, features), _members(y, reference)).tolist()
    else:
        values = [squared_mmd(features[i], reference[j]) for i, j in zip(x, y, strict=True)]
    return Spread(float(np.mean(values)), float(np.std(values)))


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate for all of (m, D) and (n, D), in float64, with k(a, b) = (a·b/D + 1)³.

    Gretton et al. (2012), "A kernel two-sample test", eq. 3.
    """
    every = [torch.ones(1, len(set_), dtype=torch.float64, device=set_.device) for set_ in (x, y)]
    return float(squared_mmds(x, y, *every))


def squared_mmds(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """`squared_mmd` of subsets, float64 (S,): in_x (S, m) and in_y (S, n) are 1 for the rows of a subset, else 0."""
    x, y = x.double(), y.double()
    m, n = in_x.sum(1), in_y.sum(1)
    within_x, within_y = _kernel_sums(x, x, in_x, in_x, same=True), _kernel_sums(y, y, in_y, in_y, same=True)
    across = _kernel_sums(x, y, in_x, in_y, same=False)
    return within_x / (m * (m - 1)) + within_y / (n * (n - 1)) - 2 * across / (m * n)


def _kernel_sums(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor, same: bool) -> Tensor:
    """The sum of k over the pairs of each subset, (S,); same: a is b, and no row is paired with itself."""
    total = in_a.new_zeros(len(in_a))
    dimensions = a.shape[1]
    for i in range(0, len(a), TILE):
        rows, of_rows = a[i : i + TILE], in_a[:, i : i + TILE]
        for j in range(i if same else 0, len(b), TILE):
            base = (rows @ b[j : j + TILE].T).div_(dimensions).add_(1)
            k = (base * base).mul_(base)
            if same and i == j:
                k.fill_diagonal_(0)
            found = ((of_rows @ k) * in_b[:, j : j + TILE]).sum(1)
            total += found if i == j or not same else 2 * found  # the kernel is symmetric
    return total


def _members(subsets: list[Tensor], rows: Tensor) -> Tensor:
    """float64 (S, len(rows)): 1 where a row is in a subset."""
    found = torch.zeros(len(subsets), len(rows), dtype=torch.float64)
    for members, chosen in zip(found, subsets, strict=True):
        members[chosen] = 1
    return found.to(rows.device)
