"""How long the Fréchet distance takes at Inception's 2048 dimensions, beside clean-fid's function in the same run.

    python benchmarks/frechet.py [--n 5000] [--repeats 3]     exit code 1 below 10× or where the two differ

Two samples of N correlated normals. Each function gets the same moments and threads; the medians of its repeats are
compared. One thread, because more of them than free cores measure how they wait for each other.
"""

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from dtrain.evaluation.metrics.frechet import frechet_distance
from dtrain.evaluation.metrics.statistics import Statistics

SPEEDUP_BAR, AGREEMENT_BAR = 10.0, 1e-6


def timed(functions: list[Callable[[], float]], repeats: int) -> list[tuple[float, list[float]]]:
    """(value, seconds of each call) of each function, called in turn so that a busy machine slows them alike."""
    values, seconds = [0.0] * len(functions), [[] for _ in functions]
    for _ in range(repeats):
        for i, function in enumerate(functions):
            started = time.perf_counter()
            values[i] = function()
            seconds[i].append(time.perf_counter() - started)
    return list(zip(values, seconds, strict=True))


def sample(seed: int, n: int, dimensions: int) -> Statistics:
    """Spectrum falling as features' do, over four decades."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dimensions)) * np.geomspace(1, 1e-2, dimensions)
    x = x @ np.linalg.qr(rng.normal(size=(dimensions, dimensions)))[0]
    return Statistics(n, x.mean(0), np.cov(x, rowvar=False))


def main() -> int:
    from cleanfid.fid import frechet_distance as cleanfid

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--n", type=int, default=5000)
    arguments.add_argument("--dimensions", type=int, default=2048)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=1)
    given = arguments.parse_args()
    a, b = (sample(seed, given.n, given.dimensions) for seed in (0, 1))
    with threadpool_limits(given.threads):
        (ours, our_seconds), (theirs, their_seconds) = timed(
            [lambda: frechet_distance(a, b), lambda: cleanfid(a.mean, a.cov, b.mean, b.cov)], given.repeats
        )
    ratio = np.median(their_seconds) / np.median(our_seconds)
    difference = abs(ours - theirs) / theirs
    print(f"D = {given.dimensions}, N = {given.n}, {given.repeats} repeats, {given.threads} thread(s)")
    print(f"{'':10} {'median s':>9} {'fastest s':>9} {'distance':>20}")
    for name, value, seconds in (("dtrain", ours, our_seconds), ("clean-fid", theirs, their_seconds)):
        print(f"{name:10} {np.median(seconds):9.2f} {min(seconds):9.2f} {value:20.12f}")
    passed = ratio >= SPEEDUP_BAR and difference <= AGREEMENT_BAR
    verdict = "ok" if passed else "MISSED"
    print(f"{ratio:.1f}× as fast (>= {SPEEDUP_BAR:g}), relative difference {difference:.1e}: {verdict}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
