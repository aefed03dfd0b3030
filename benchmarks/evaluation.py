"""What an evaluation spends beside the network: moments, kernel distance and imports, beside what others take for them.

    python benchmarks/evaluation.py [--repeats 5]     exit code 1 where a bound is missed

One thread and CPU seconds, in turns, medians; the peer is the faster one of clean-fid's and torch-fidelity's. Features
are float32 with the spectrum and the mean of a network's. The imports are what `dtrain sample` and `dtrain evaluate`
load before they begin, each in a process of its own, beside torch alone.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from dtrain import distributed
from dtrain.evaluation.metrics.kernel import kernel_distance
from dtrain.evaluation.metrics.moments import MomentStream
from dtrain.evaluation.metrics.statistics import Statistics

N, DIMENSIONS, BLOCK = 5000, 2048, 64  # samples, Inception's features, samples that come at a time
SLOWER = 1.2  # at most, of the faster peer's time
MOMENTS_AGREE, KERNEL_AGREES = 1e-12, 1e-6  # relative
IMPORT = 2.2 / 1.2  # of torch's own import

IMPORTS = {
    "torch": "import torch",
    "dtrain sample": "import dtrain.cli, dtrain.evaluation.sample",
    "dtrain evaluate": "import dtrain.cli, dtrain.evaluation.evaluate",
}


def features(n: int, seed: int, shift: float) -> torch.Tensor:
    """float32 (n, DIMENSIONS), not negative, correlated."""
    weights = np.random.default_rng(0).normal(size=(256, DIMENSIONS)) / 16
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 256)) @ weights + 0.6 * rng.normal(size=(n, DIMENSIONS)) + 0.2 + shift
    return torch.from_numpy(np.maximum(x, 0).astype(np.float32))


def seconds(functions: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Name → median of the CPU seconds of each function, called in turn."""
    taken = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.process_time()
            function()
            taken[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def our_moments(x: torch.Tensor) -> Statistics:
    stream = MomentStream(DIMENSIONS)
    for block in x.split(BLOCK):
        stream.update(block)
    return stream.compute()


def moments(repeats: int) -> list[tuple[str, float, float, float]]:
    """(name, seconds, ratio, bound); what clean-fid does in a line each time, torch-fidelity has as a function."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    x = features(N, 1, 0.0)
    array = x.numpy()
    taken = seconds(
        {
            "dtrain": lambda: our_moments(x),
            "clean-fid": lambda: (np.mean(array, axis=0), np.cov(array, rowvar=False)),
            "torch-fidelity": lambda: fid_features_to_statistics(x),
        },
        repeats,
    )
    ours, exact = our_moments(x), array.astype(np.float64)
    cov = np.cov(exact, rowvar=False)
    apart = max(
        abs(ours.mean - exact.mean(0)).max() / abs(ours.mean).max(),
        abs(ours.cov - cov).max() / abs(cov).max(),
    )
    return [*_rows(f"moments, N = {N:,}", taken), ("  difference of float64's", apart, apart, MOMENTS_AGREE)]


def kernels(n: int, repeats: int) -> list[tuple[str, float, float, float]]:
    from cleanfid.fid import kernel_distance as cleanfid
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kernel_mmd, kid_features_to_metric

    x, y = features(n, 1, 0.0), features(n, 2, 0.02)
    size = min(1000, n)
    fidelity = {"kid_subsets": 100, "kid_subset_size": size, "rng_seed": 0, "verbose": False}
    taken = seconds(
        {
            "dtrain": lambda: kernel_distance(x, y, 0),
            "clean-fid": lambda: cleanfid(x.numpy(), y.numpy(), num_subsets=100, max_subset_size=size),
            "torch-fidelity": lambda: kid_features_to_metric(x, y, **fidelity)[KEY_METRIC_KID_MEAN],
        },
        repeats,
    )
    a, b = x[:1000], y[:1000]  # of which every subset is the same
    exact = kernel_mmd(a.double().numpy(), b.double().numpy())
    apart = abs(kernel_distance(a, b, 0).mean - exact) / abs(exact)
    return [*_rows(f"KID, N = {n:,}", taken), ("  difference of float64's", apart, apart, KERNEL_AGREES)]


def _rows(what: str, taken: dict[str, float]) -> list[tuple[str, float, float, float]]:
    ours, peer = taken["dtrain"], min(value for name, value in taken.items() if name != "dtrain")
    peers = [(f"  {name}", value, None, None) for name, value in taken.items() if name != "dtrain"]
    return [(what, ours, ours / peer, SLOWER), *peers]


def imports(repeats: int) -> list[tuple[str, float, float, float]]:
    taken = {name: [] for name in IMPORTS}
    for _ in range(repeats):
        for name, code in IMPORTS.items():
            before = _of_children()
            subprocess.run([sys.executable, "-c", code], check=True)
            taken[name].append(_of_children() - before)
    bare = statistics.median(taken.pop("torch"))
    rows = [("import torch", bare, None, None)]
    return rows + [(f"  of {name}", t := statistics.median(v), t / bare, IMPORT) for name, v in taken.items()]


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=5)
    repeats = arguments.parse_args().repeats
    distributed.keep_freed_memory()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with threadpool_limits(1):
        rows = [*moments(repeats), *kernels(1000, 1), *kernels(N, min(repeats, 3)), *imports(repeats)]
    print(f"{DIMENSIONS:,} dimensions, CPU seconds on one thread, medians of {repeats} (KID: 1 and 3), load {load:.1f}")
    missed = False
    for name, value, ratio, bound in rows:
        shown = f"{name:28}" + (f"{value:10.1e}" if value < 1e-3 else f"{value:10.2f}")
        if bound is not None:
            missed |= not ratio <= bound
            shown += f"  {ratio:8.2f} x  <= {bound:.2f}" if bound > 0.1 else f"{'':12}  <= {bound:.0e}"
            shown += "  ok" if ratio <= bound else "  MISSED"
        print(shown)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
