"""Whether a training's memory grows with its steps: what is resident, what malloc has given out, and Python's objects.

    python benchmarks/memory.py --steps 20000 [--traced] [key=value …]

A tiny DiT on scikit-learn's digits (run.seed 0), one rank, a journal line every step. The last column: lines that
MLflow does not have yet, with tracking.enabled=true. Growth is the slope of a straight line through the first quarter
of the samples, and through the rest. --traced: Python's allocations too, with the places that grew most; slower.
"""

import argparse
import ctypes
import gc
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import psutil

SAMPLES = 40
KIB, MIB = 2**10, 2**20


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def given_out() -> int:
    """Bytes that malloc has given out, its own mappings included."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=20000)
    arguments.add_argument("--traced", action="store_true")
    arguments.add_argument("overrides", nargs="*")
    given = arguments.parse_args()

    sys.path.insert(0, str(Path(__file__).parent.parent))  # `tests` could be somebody else's package
    from dtrain import distributed
    from dtrain.data.pack.pack import pack
    from dtrain.training.run_training import train
    from dtrain.training.steps import Steps
    from tests.digits import tiny

    distributed.prepare()
    process, rows, snapshots = psutil.Process(), [], []
    every, step = max(1, given.steps // SAMPLES), Steps._step

    def watched(self: Steps) -> None:
        step(self)
        if self.position.step % every == 0:
            gc.collect()
            shipper = self.tracker._shipper
            waiting = 0 if shipper is None else len(shipper._pending.lines)
            python = tracemalloc.get_traced_memory()[0]
            rows.append((self.position.step, process.memory_info().rss, given_out(), python, waiting))
            if given.traced and self.position.step in (given.steps // 4 // every * every, given.steps):
                snapshots.append(tracemalloc.take_snapshot())

    Steps._step = watched
    with tempfile.TemporaryDirectory() as folder:
        pack("sklearn:digits", Path(folder) / "digits", holdout=360)
        more = [f"train.steps={given.steps}", "train.checkpoint_every=1000000", *given.overrides]
        config = tiny(Path(folder) / "digits", Path(folder) / "runs", *more)
        if given.traced:
            tracemalloc.start(8)
        train(config)
    print(f"{'step':>8} {'resident MiB':>14} {'malloc MiB':>12} {'Python MiB':>12} {'lines for MLflow':>18}")
    for number, *sizes, waiting in rows[:: max(1, len(rows) // 10)] + rows[-1:]:
        print(f"{number:>8,} {sizes[0] / MIB:>14.2f} {sizes[1] / MIB:>12.2f} {sizes[2] / MIB:>12.2f} {waiting:>18,}")
    table = np.array(rows, dtype=float)
    for part in (table[: len(table) // 4], table[len(table) // 4 :]):
        slopes = [np.polyfit(part[:, 0], part[:, column], 1)[0] / KIB for column in (1, 2, 3)]
        where = f"steps {part[0, 0]:,.0f} to {part[-1, 0]:,.0f}"
        print(f"{where}: {slopes[0]:.3f} KiB a step resident, {slopes[1]:.3f} malloc, {slopes[2]:.3f} Python")
    if len(snapshots) == 2:
        for line in snapshots[1].compare_to(snapshots[0], "lineno")[:12]:
            print(line)


if __name__ == "__main__":
    main()
