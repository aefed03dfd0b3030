"""First and second moments of features: streamed in float64, joined over batches and ranks.

They are held as count n, mean μ and scatter S = Σ(x−μ)(x−μ)ᵀ and joined after Chan, Golub & LeVeque (1979), "Updating
formulae and a pairwise algorithm for computing sample variances". Sums of x and xxᵀ would cancel when means are large.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.errors import SharedError
from dtrain.evaluation.metrics.statistics import Statistics

AT_A_TIME = 1024  # rows that a stream joins to the rest in one product
LEAF = 256  # columns from which on a triangle is not halved: smaller products are slower


@dataclass
class Moments:
    """Of a set of rows; `take` and `join` change them in place."""

    count: int
    mean: Tensor  # float64 (D,)
    scatter: Tensor  # float64 (D, D), right in its lower triangle

    @classmethod
    def empty(cls, dimensions: int, device: torch.device | str = "cpu") -> "Moments":
        mean = torch.zeros(dimensions, dtype=torch.float64, device=device)
        return cls(0, mean, mean.new_zeros(dimensions, dimensions))

    def take(self, rows: Tensor, n: int) -> None:
        """Join the first n of rows (more than n, D), float64, which are overwritten."""
        if not n:
            return
        x = rows[:n]
        mean = x.mean(0)
        x -= mean
        # S grows by Σ(x−μₓ)(x−μₓ)ᵀ and c·δδᵀ with δ = μₓ − μ: with √c·δ as one more row, one product is both.
        torch.mul(mean - self.mean, math.sqrt(self.count * n / (self.count + n)), out=rows[n])
        _add_products(self.scatter, rows[: n + 1])
        self._move(n, mean)

    def join(self, other: "Moments") -> None:
        """Join those of another set; either may be empty."""
        if not other.count:
            return
        delta = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(delta, delta, alpha=self.count * other.count / (self.count + other.count))
        self._move(other.count, other.mean)

    def _move(self, n: int, mean: Tensor) -> None:
        self.count += n
        self.mean = self.mean + (mean - self.mean) * (n / self.count)

    def over_ranks(self, group: Any = None) -> "Moments":
        """Those of all ranks' sets together, the same on every rank. A collective: two sums over ranks."""
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return self
        sums = torch.cat([self.mean.new_tensor([self.count]), self.count * self.mean])
        dist.all_reduce(sums, group=group)
        n, mean = sums[0], sums[1:] / sums[0].clamp(min=1)
        delta = self.mean - mean
        scatter = torch.addr(self.scatter, delta, delta, alpha=self.count)
        dist.all_reduce(scatter, group=group)
        return Moments(int(n), mean, scatter)

    def statistics(self) -> Statistics:
        """Raises SharedError below two rows, which have no covariance."""
        if self.count < 2:
            raise SharedError(
                f"a covariance needs at least 2 images, and there are {self.count}; raise eval.num_samples"
            )
        cov = self.scatter / (self.count - 1)
        _mirror(cov)
        return Statistics(self.count, self.mean.cpu().numpy(), cov.cpu().numpy())


class MomentStream:
    """Moments of features that come in batches, of this rank while updating and of all ranks in `compute`.

    Rows are collected and joined many at a time, because each joining goes through all D² products. A rank without
    samples needs no update.
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu", begun: Moments | None = None):
        """begun: what there is already; it is added to in place."""
        self._joined = Moments.empty(dimensions, device) if begun is None else begun
        self._rows = torch.empty(AT_A_TIME + 1, dimensions, dtype=torch.float64, device=device)
        self._waiting = 0  # of these

    @property
    def count(self) -> int:
        return self._joined.count + self._waiting

    def update(self, features: Tensor) -> None:
        """Take in features (N, D) of any dtype and device, N ≥ 0."""
        dimensions = self._rows.shape[1]
        if features.ndim != 2 or features.shape[1] != dimensions:
            raise ValueError(f"features of shape (N, {dimensions}) expected, got {tuple(features.shape)}")
        while len(features):
            part = features[: AT_A_TIME - self._waiting]
            self._rows[self._waiting : self._waiting + len(part)] = part
            self._waiting += len(part)
            features = features[len(part) :]
            if self._waiting == AT_A_TIME:
                self.joined()

    def compute(self) -> Statistics:
        """The joint Statistics of all ranks. A collective; what this rank goes on taking in is its own.

        Raises SharedError below two samples.
        """
        return self.joined().over_ranks().statistics()

    def joined(self) -> Moments:
        """Those of all that this rank has taken in."""
        self._joined.take(self._rows, self._waiting)
        self._waiting = 0
        return self._joined


def statistics_of(features: Tensor) -> Statistics:
    """The Statistics of features (N, D), N ≥ 2, on one rank."""
    stream = MomentStream(features.shape[1], features.device)
    stream.update(features)
    return stream.joined().statistics()


def _add_products(scatter: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ·rows (D, D) to the lower triangle of the scatter and to little above it: half of the arithmetic."""
    size = len(scatter)
    if size <= LEAF:
        scatter.addmm_(rows.T, rows)
        return
    half = size // 2
    _add_products(scatter[:half, :half], rows[:, :half])
    _add_products(scatter[half:, half:], rows[:, half:])
    scatter[half:, :half].addmm_(rows[:, half:].T, rows[:, :half])


def _mirror(matrix: Tensor) -> None:
    """Make a matrix symmetric, as its lower triangle says."""
    size = len(matrix)
    if size <= LEAF:
        matrix.copy_(matrix.tril() + matrix.tril(-1).T)
        return
    half = size // 2
    _mirror(matrix[:half, :half])
    _mirror(matrix[half:, half:])
    matrix[:half, half:] = matrix[half:, :half].T
