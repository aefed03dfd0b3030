"""Kernel distance (KID): the squared maximum mean discrepancy under a cubic kernel, averaged over random subsets.

Bińkowski, Sutherland, Arbel & Gretton (2018), "Demystifying MMD GANs". Unbiased at any count, so it may be negative.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from dtrain.evaluation.metrics.subsets import KERNEL_REFERENCE, KERNEL_SAMPLES, Subsets

SUBSETS, SUBSET_SIZE = 100, 1000  # the paper's and everybody's


class Spread(NamedTuple):
    mean: float
    std: float  # over subsets, which share samples: not the error of the mean


def kernel_distance(
    features: Tensor, reference: Tensor, seed: int, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> Spread:
    """KID of features (N, D) and (M, D), mean and standard deviation over seeded subsets.

    A subset has `subset_size` rows of each, or all of the smaller set. Needs N, M ≥ 2.
    """
    rows = Subsets(seed)
    size = min(subset_size, len(features), len(reference))
    values = []
    for i in range(subsets):
        x = features[rows.choose(len(features), size, i, KERNEL_SAMPLES)]
        y = reference[rows.choose(len(reference), size, i, KERNEL_REFERENCE)]
        values.append(squared_mmd(x, y))
    return Spread(float(np.mean(values)), float(np.std(values)))


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate for (m, D) and (n, D), in float64, with k(a, b) = (a·b/D + 1)³.

    Gretton et al. (2012), "A kernel two-sample test", eq. 3.
    """
    x, y = x.double(), y.double()
    (m, dimensions), n = x.shape, len(y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dimensions + 1) ** 3

    within_x, within_y = kernel(x, x), kernel(y, y)
    value = (within_x.sum() - within_x.trace()) / (m * (m - 1))
    value += (within_y.sum() - within_y.trace()) / (n * (n - 1))
    return float(value - 2 * kernel(x, y).mean())
