"""How well batches are mixed, by streams V and window W, beside a uniform shuffle: on shards sorted by class.

    python benchmarks/order.py                       200 and 1,000 shards of 1,000 samples of 100 classes
    python benchmarks/order.py --shards 200 --batch 512

Of each batch's class histogram the total-variation distance from the data set's own, in the mean over batches spread
over three epochs, divided by that of batches drawn uniformly: 1 is as good as a uniform shuffle, less is better. Exit
code 1 where the defaults of `data.streams` and `data.shuffle_window` are over 1.1.
"""

import argparse
import sys

import numpy as np

from dtrain.config.data import Data
from dtrain.data.order.order import Order
from dtrain.data.order.streams import default_streams

CLASSES, SHARD, BATCHES = 100, 1000, 600
BOUND = 1.1


def distance(order: Order, classes: np.ndarray, batch: int) -> float:
    """Mean total-variation distance of batches in step with three epochs' beginnings, middles and ends."""
    share = np.bincount(classes) / len(classes)
    total = 0.0
    for n in range(BATCHES):
        first = n * 3 * order.samples // BATCHES
        histogram = np.bincount(classes[order.sample(np.arange(first, first + batch))], minlength=len(share))
        total += np.abs(histogram / batch - share).sum() / 2
    return total / BATCHES


def uniform_distance(classes: np.ndarray, batch: int) -> float:
    rng, share, total = np.random.default_rng(0), np.bincount(classes) / len(classes), 0.0
    for _ in range(BATCHES):
        histogram = np.bincount(classes[rng.choice(len(classes), batch, replace=False)], minlength=len(share))
        total += np.abs(histogram / batch - share).sum() / 2
    return total / BATCHES


def table(shards: int, batch: int) -> dict[tuple[int, int], float]:
    """(V, W) → distance relative to a uniform shuffle's; W = L is the whole stream."""
    sizes = np.full(shards, SHARD)
    classes = np.sort(np.arange(sizes.sum()) % CLASSES)
    uniform = uniform_distance(classes, batch)
    samples = len(classes)
    pairs = [(v, w) for v in (1, 16, 64, 128, 256) for w in (1024, 4096, 16384, samples)] + [default(samples)]
    cells = sorted({(v, min(w, samples // v)) for v, w in pairs})
    return {(v, w): distance(Order(1, sizes, v, w), classes, batch) / uniform for v, w in cells}


def default(samples: int) -> tuple[int, int]:
    streams = default_streams(samples)
    return streams, min(Data.model_fields["shuffle_window"].default, samples // streams)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    missed = 0
    for shards in options.shards:
        found, chosen = table(shards, options.batch), default(shards * SHARD)
        print(
            f"{shards:,} shards of {SHARD:,}, batches of {options.batch}\n{'V':>6}{'W':>10}{'distance / uniform':>22}"
        )
        for (v, w), ratio in found.items():
            mark = "  the default" if (v, w) == chosen else "  W = L" if w == shards * SHARD // v else ""
            print(f"{v:6}{w:10,}{ratio:22.3f}{mark}")
        missed += found[chosen] > BOUND
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
