"""The Fréchet distance of two sets of features, what it would be with infinitely many samples, and how sure it is."""

from typing import NamedTuple

import numpy as np
import scipy.linalg
from torch import Tensor

from dtrain.evaluation.metrics.moments import statistics_of
from dtrain.evaluation.metrics.statistics import Statistics
from dtrain.evaluation.metrics.subsets import BOOTSTRAP, EXTRAPOLATION, Subsets

EXTRAPOLATION_POINTS = 15
NORMAL_95 = 1.959964  # standard deviations on either side that hold 95 % of a normal distribution


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """The squared Fréchet (2-Wasserstein) distance of the Gaussians with these moments, in float64.

        d² = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½

    Dowson & Landau (1982), "The Fréchet distance between multivariate normal distributions"; as a measure of generated
    images, Heusel et al. (2017), eq. 6. Finite and ≥ 0 for every finite input, singular covariances included. It is
    biased upwards at small counts: by D(D+5)/4·(1/N + 1/M) to first order for two samples of one unit Gaussian.
    Raises ValueError for moments of different dimensions or with non-finite values.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.dimensions} and of {b.dimensions} dimensions have no distance")
    if not all(np.isfinite(x).all() for x in (a.mean, a.cov, b.mean, b.cov)):
        raise ValueError("the moments hold non-finite values: some feature was not a finite number")
    if b.count < a.count:
        a, b = b, a  # the distance is symmetric; the first one, whose rank decides the cost, has at most count − 1
    shift = a.mean - b.mean
    squared = shift @ shift + np.trace(a.cov) + np.trace(b.cov) - 2 * _trace_sqrt_product(a.cov, b.cov)
    return max(0.0, float(squared))  # rounding alone takes a square below 0


def _trace_sqrt_product(a: np.ndarray, b: np.ndarray) -> float:
    """tr (ab)^½ of symmetric positive semi-definite a, b (D, D).

    With a = AAᵀ, the non-zero eigenvalues of ab are those of the symmetric AᵀbA: no matrix root, nothing complex. An
    eigenvalue below working precision is noise, and its root is 10⁸ times that; where this would be felt, the same
    number comes more slowly as the nuclear norm of AᵀB with b = BBᵀ, in which nothing is squared.
    """
    factor = _factor(a)
    eigenvalues = np.linalg.eigvalsh(_congruent(factor, b))
    noise = np.finfo(np.float64).eps * eigenvalues.max(initial=0)
    if noise <= 0:  # one of them is zero, or they share no direction
        return 0.0
    roots = np.sqrt(eigenvalues.clip(min=0))
    if np.sum(noise / np.sqrt(eigenvalues.clip(min=noise))) > 1e-9 * np.sum(roots):
        return float(np.linalg.svd(factor.T @ _factor(b), compute_uv=False).sum())
    return float(roots.sum())


def _congruent(factor: np.ndarray, b: np.ndarray) -> np.ndarray:
    """factorᵀ b factor (rank, rank) for symmetric b; right in the lower triangle, which is what eigvalsh reads.

    Cholesky's factor is triangular, and LAPACK's sygst uses that and the symmetry: half the time of two products.
    """
    if factor.shape != b.shape or np.triu(factor, 1).any():
        return factor.T @ b @ factor
    result, info = scipy.linalg.lapack.dsygst(b.T, factor.T, itype=2, lower=0)  # U b Uᵀ, U = factorᵀ in Fortran's order
    assert info == 0, info
    return result.T


def _factor(matrix: np.ndarray) -> np.ndarray:
    """A (D, rank) with AAᵀ = matrix up to rounding: Cholesky's, pivoted and cut at its rank where one is not definite.

    Fewer samples than dimensions, or a constant feature, make a covariance singular. LAPACK's pstrf takes a fifth of
    the time of eigenvectors.
    """
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        upper, pivots, rank, _ = scipy.linalg.lapack.dpstrf(matrix)
        factor = np.zeros((len(matrix), rank))
        factor[pivots - 1] = np.triu(upper)[:rank].T
        return factor


class Extrapolated(NamedTuple):
    value: float
    error: float  # standard error of the line's intercept


def fd_infinity(features: Tensor, reference: Statistics, seed: int) -> Extrapolated:
    """The Fréchet distance extrapolated to infinitely many samples, of features (N, D), N ≥ 4 D.

    Its bias falls as 1/N: a line through the distances of growing random subsets, over 1/n, meets 0 there. Chong &
    Forsyth (2020), "Effectively unbiased FID and Inception Score and where to find them". The reference's own bias, by
    its count, stays. The error is the fit's: the subsets share samples, so that it says less than a bootstrap would.
    """
    subsets = Subsets(seed)
    total, dimensions = features.shape
    smallest = smallest_extrapolation_count(total, dimensions)
    counts = np.linspace(smallest, total, EXTRAPOLATION_POINTS).round().astype(int)
    distances = [
        frechet_distance(statistics_of(features[subsets.choose(total, int(n), i, EXTRAPOLATION)]), reference)
        for i, n in enumerate(counts)
    ]
    # A point's variance falls as 1/n too: weigh by n.
    design = np.stack([np.ones(len(counts)), 1 / counts], axis=1) * np.sqrt(counts)[:, None]
    weighted = np.array(distances) * np.sqrt(counts)
    solution, *_ = np.linalg.lstsq(design, weighted, rcond=None)
    spread = np.sum((weighted - design @ solution) ** 2) / (len(counts) - 2)
    return Extrapolated(float(solution[0]), float(np.sqrt(spread * np.linalg.inv(design.T @ design)[0, 0])))


def smallest_extrapolation_count(total: int, dimensions: int) -> int:
    """Below twice the dimensions the bias is no longer a line over 1/n."""
    return max(total // 10, 2 * dimensions)


def bootstrap_interval(
    features: Tensor, reference: Statistics, seed: int, resamplings: int, value: float
) -> tuple[float, float]:
    """A 95 % interval around the distance `value` of features (N, D): how far another N samples might have put it.

    value ± 1.96 standard deviations of the distance over sets of N drawn with replacement (Efron 1979). Their mean is
    not used: resampling adds the bias of finite N a second time. The reference counts as fixed. resamplings ≥ 2.
    """
    subsets = Subsets(seed)
    distances = [
        frechet_distance(statistics_of(features[subsets.resample(len(features), i, BOOTSTRAP)]), reference)
        for i in range(resamplings)
    ]
    reach = NORMAL_95 * float(np.std(distances, ddof=1))
    return max(0.0, value - reach), value + reach
