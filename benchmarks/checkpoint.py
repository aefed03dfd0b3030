"""How long a save keeps training waiting, against a plain copy of the same bytes and DeepSpeed's own checkpoint.

    deepspeed --num_accelerators 2 benchmarks/checkpoint.py      (or alone: python benchmarks/checkpoint.py)

A DiT of about 33 M parameters at ZeRO stage 2 with one EMA: 16 bytes a parameter, shared by the ranks. Medians of five.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from dtrain import distributed
from dtrain.checkpoint.writer import Writer
from dtrain.config import validate
from dtrain.training.player import Player

REPEATS = 5


def config_of(stage: int, batch: int):
    tree = {
        "run": {"name": "benchmark"},
        "data": {"shards": "none", "image_size": 32, "channels": 3, "batch_size": batch},
        "model": {"name": "dit", "size": "S/8", "num_classes": 10},
        "deepspeed": {"zero_stage": stage},
        "train": {"steps": 1},
    }
    return validate(tree, "benchmark")


def seconds(work) -> float:
    distributed.barrier()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--stage", type=int, default=2)
    given = arguments.parse_args([a for a in sys.argv[1:] if not a.startswith("--local_rank")])
    distributed.set_thread_counts()
    distributed.initialize()
    rank, world_size = distributed.rank(), distributed.world_size()
    config = config_of(given.stage, batch=8 * world_size)
    engine = Player.of(config, micro_batch=8)
    x = torch.randn(8, 3, 32, 32)
    t, y = torch.randint(0, 1000, (8,)), torch.randint(0, 10, (8,))

    def step() -> None:
        engine.backward((engine(x, t, y) - x).square().mean())
        engine.step(1e-4)

    step()
    place = Path(distributed.on_rank_0(tempfile.mkdtemp, None, "dtrain-benchmark-"))
    writer = Writer(place, rank, world_size)
    held = sum(p.values.numel() for p in engine.pieces())
    source, target = torch.ones(held), torch.zeros(held)
    rows = {name: [] for name in ("copy", "stage", "write", "deepspeed", "step", "step while writing")}
    for repeat in range(REPEATS + 1):  # the first save allocates its buffer: not counted
        copied = seconds(lambda: target.copy_(source))
        usual = [seconds(step) for _ in range(2)]
        staged = seconds(
            lambda r=repeat: writer.begin(r, engine.pieces(), engine.tensor_sizes(), {"step": r, "images": 0})
        )
        started, busy = time.perf_counter(), []
        while not all(distributed.gather_objects(writer.written)):
            busy.append(seconds(step))
        written = time.perf_counter() - started
        writer.commit()
        theirs = seconds(lambda r=repeat: engine.engine.save_checkpoint(str(place / "theirs"), tag=f"t{r}"))
        distributed.barrier()
        if rank == 0:
            shutil.rmtree(place / "theirs")
        if repeat:
            for name, value in zip(rows, (copied, staged, written, theirs), strict=False):
                rows[name].append(value)
            rows["step"] += usual
            rows["step while writing"] += busy
    if rank == 0:
        shutil.rmtree(place)
        median = {name: statistics.median(values) for name, values in rows.items() if values}
        print(f"stage {given.stage}, {world_size} ranks, {4 * held / 2**20:,.0f} MiB a rank, medians of {REPEATS}")
        table = [
            ("memcpy of the same bytes", "copy", None, None),
            ("the loop waits for a save", "stage", "copy", "<= 1.5"),
            ("", "stage", "deepspeed", "<= 0.33"),
            ("written and durable after", "write", None, None),
            ("DeepSpeedEngine.save_checkpoint", "deepspeed", None, None),
            ("a step", "step", None, None),
            ("a step while writing", "step while writing", "step", "<= 1.3"),
        ]
        for label, name, peer, bar in table:
            ratio = f"{median[name] / median[peer]:6.2f} x {peer:9} {bar}" if peer and name in median else ""
            print(f"{label:34} {1000 * median.get(name, float('nan')):9.1f} ms  {ratio}")
    distributed.finalize()


if __name__ == "__main__":
    main()
