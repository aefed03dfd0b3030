"""What is said of normals by their own counts: distance to the law, moments, and what ties numbers to each other."""

import numpy as np
from scipy.special import ndtr
from scipy.stats import kstwobign

from dtrain.draws import Purpose
from dtrain.normals import GRID, tables
from dtrain.randomness import Draws

MOST = 1 << 24  # of a number, in units of its grid
ROW = 4096  # numbers a key
MOMENTS = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}  # power → (mean, variance) of a normal's


def scores(numbers: int, seed: int) -> dict[str, float]:
    """Of so many numbers: `ks`, a p-value, and by name how many standard errors an estimate is from its expectation.

    Counted on the numbers' grid, so that the distance is exact. Products are of numbers that stand beside each other in
    a row, in rows of keys beside each other, and in those of one key for two purposes; also of their squares less 1.
    """
    draws, rows = Draws(seed, 2), numbers // ROW
    counts, sums = np.zeros(2 * MOST + 1, dtype=np.int32), dict.fromkeys(MOMENTS, 0.0)
    pairs = {f"{of} {what}": [0.0, 0] for of in ("numbers", "squares") for what in ("neighbours", "keys", "purposes")}
    for first in range(0, rows, 256):
        keys = range(first, min(first + 256, rows))
        z, other = (draws.normals(p, keys, (ROW,)).astype(np.float64) for p in (Purpose.NOISE, Purpose.SAMPLE_NOISE))
        on_grid = (z / GRID).astype(np.int64)
        assert np.array_equal(on_grid * GRID, z)
        seen, times = np.unique(on_grid, return_counts=True)
        counts[seen + MOST] += times.astype(np.int32)
        for power in sums:
            sums[power] += (z**power).sum()
        for of, a, b in (("numbers", z, other), ("squares", (z**2 - 1) / 2**0.5, (other**2 - 1) / 2**0.5)):
            products = {"neighbours": a[:, :-1] * a[:, 1:], "keys": a[:-1] * a[1:], "purposes": a * b}
            for what, product in products.items():
                pairs[f"{of} {what}"][0] += product.sum()
                pairs[f"{of} {what}"][1] += product.size
    n, seen = rows * ROW, np.flatnonzero(counts)
    up_to, law = np.cumsum(counts[seen]), ndtr((seen - MOST) * GRID)
    distance = max(np.abs(up_to / n - law).max(), np.abs((up_to - counts[seen]) / n - law).max())
    found = {"ks": float(kstwobign.sf(distance * n**0.5))}
    found |= {f"moment {p}": (sums[p] / n - mean) / (variance / n) ** 0.5 for p, (mean, variance) in MOMENTS.items()}
    return found | {name: total / count**0.5 for name, (total, count) in pairs.items()}


def exact_law(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P(z < x), P(z ≤ x)) of the law of `dtrain.normals`, counted over all 2^32 pairs of table entries."""
    lower, upper = (table.astype(np.float64) for table in tables())
    sides = [np.array([np.searchsorted(upper, at - lower, side).sum() for at in x]) for side in ("left", "right")]
    return sides[0] / 2**32, sides[1] / 2**32
