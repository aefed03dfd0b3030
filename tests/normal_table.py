"""How `dtrain/normals.npy` was made: python -m tests.normal_table writes it.

The upper half of 2^16 points of equal weight that stand for the standard normal, int32 in units of 2^-24, ascending:
the mean of the normal in each interval of probability 2^-16. That leaves out what varies within the outermost
interval. So the 64 outermost points move, by the least sum of squares for which the second, fourth, sixth and eighth
moments of all points are 1, 3, 15 and 105.
"""

from pathlib import Path

import numpy as np
from scipy.special import ndtri

import dtrain

POINTS, OUTERMOST = 1 << 16, 64
MOMENTS = {2: 1, 4: 3, 6: 15, 8: 105}


def table() -> np.ndarray:
    """int32 (2^15,)."""
    edges = ndtri(np.arange(POINTS // 2, POINTS + 1) / POINTS)
    density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
    points = POINTS * (density[:-1] - density[1:])
    powers = np.array(list(MOMENTS))[:, None]
    wanted = np.array(list(MOMENTS.values())) * POINTS / 2 - (points[:-OUTERMOST] ** powers).sum(1)
    outermost = points[-OUTERMOST:]
    for _ in range(50):  # Newton's steps, each the shortest
        lacking, slope = wanted - (outermost**powers).sum(1), powers * outermost ** (powers - 1)
        outermost = outermost + np.linalg.lstsq(slope, lacking, rcond=None)[0]
    points[-OUTERMOST:] = outermost
    return np.rint(np.sort(points) * 2**24).astype(np.int32)


if __name__ == "__main__":
    np.save(Path(dtrain.__file__).parent / "normals.npy", table())
