"""Distances between sets of features."""

import numpy as np
import scipy.linalg

from dtrain.evaluation.statistics import Statistics


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
    eigenvalues = np.linalg.eigvalsh(factor.T @ b @ factor)
    noise = np.finfo(np.float64).eps * eigenvalues.max(initial=0)
    if noise <= 0:  # one of them is zero, or they share no direction
        return 0.0
    roots = np.sqrt(eigenvalues.clip(min=0))
    if np.sum(noise / np.sqrt(eigenvalues.clip(min=noise))) > 1e-9 * np.sum(roots):
        return float(np.linalg.svd(factor.T @ _factor(b), compute_uv=False).sum())
    return float(roots.sum())


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
