"""What a normal costs on one core, and how many bytes of a row go to the device: medians of alternating repetitions.

    python benchmarks/draws.py
    python benchmarks/draws.py --compile          also what torch.compile makes of it: half a minute more

CPU time. The peer is NumPy's Philox with its ziggurat, which generator 1 uses. torch's own operations are what a GPU
runs; on a CPU nothing needs them. Exit code 1 where a bound is missed: nanoseconds a number, 1.2 of NumPy's; bytes a
row, 200,000.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from dtrain import device_draws
from dtrain.config import validate
from dtrain.data.declared import declared
from dtrain.draws import Purpose
from dtrain.randomness import Draws

SHAPES = {(3, 32, 32): 128, (4, 32, 32): 128, (3, 256, 256): 4}  # of a row → rows
MOST_TIME, MOST_BYTES = 1.2, 200_000


def seconds(make: Callable[[], object]) -> float:
    started = time.process_time()
    make()
    return time.process_time() - started


def nanoseconds(shape: tuple[int, ...], repetitions: int, compiled: bool) -> dict[str, float]:
    """A number, by how it is made."""
    k = torch.arange(SHAPES[shape])
    ways = {
        "ziggurat": partial(Draws(0, 1).normals, Purpose.NOISE, k.tolist(), shape),
        "generator 2": partial(Draws(0, 2).normals, Purpose.NOISE, k.tolist(), shape),
        "torch": partial(device_draws.normals, 0, Purpose.NOISE, k, shape),
    }
    if compiled:
        ways["compiled"] = partial(device_draws.normals, 0, Purpose.NOISE, k, shape, compiled=True)
    for make in ways.values():
        make()
    spent = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, make in ways.items():
            spent[name].append(seconds(make))
    numbers = len(k) * torch.Size(shape).numel()
    return {name: statistics.median(values) / numbers * 1e9 for name, values in spent.items()}


def row_bytes(generator: int, size: int) -> int:
    """Of a picture with a class, mirrored by chance, as it goes to the device."""
    tree = {
        "run": {"name": "benchmark", "generator": generator},
        "data": {"shards": ".", "image_size": size, "batch_size": 1, "flip": True},
        "model": {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 2, "num_classes": 10},
        "train": {"steps": 1},
    }
    return sum(declared(validate(tree, "the benchmark")).row_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    missed = 0
    print(f"ns a number, medians of {options.repetitions}, load {os.getloadavg()[0]:.1f}")
    for shape in SHAPES:
        found = nanoseconds(shape, options.repetitions, options.compile)
        ratio = found["generator 2"] / found["ziggurat"]
        missed += ratio > MOST_TIME
        shown = "".join(f"{name:>13} {value:6.2f}" for name, value in found.items())
        print(f"{shape!s:14}{shown}   {ratio:.2f} x the ziggurat  <= {MOST_TIME}")
    print("bytes a row to the device")
    for size in (32, 256):
        one, two = (row_bytes(generator, size) for generator in (1, 2))
        missed += two > MOST_BYTES
        print(f"{size:4} x {size:<4} generator 1 {one:12,}   generator 2 {two:12,}   <= {MOST_BYTES:,}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
