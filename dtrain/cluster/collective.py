"""A round trip through the network that gradients take, by the ranks that are there."""

import time
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist

from dtrain import distributed

BYTES = 16 << 20
REPEATS = 5


def round_trip() -> tuple[str, int, bool, float, int]:
    """(backend, ranks, whether the sum is right, seconds of one all-reduce, its bytes). A collective."""
    distributed.initialize(timeout=timedelta(minutes=2))
    device, seconds = distributed.device(), []
    for _ in range(1 + REPEATS):
        values = torch.full((BYTES // 4,), float(dist.get_rank()), device=device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        total = float(values[-1])  # waits for the device
        seconds.append(time.perf_counter() - started)
    ranks = dist.get_world_size()
    correct = total == float(values[0]) == ranks * (ranks - 1) / 2
    return dist.get_backend(), ranks, correct, median(seconds[1:]), BYTES  # the first one opens connections


def main() -> None:
    """Print it: what each of the ranks that `dtrain doctor` starts runs."""
    print(*round_trip())
    distributed.finalize()
