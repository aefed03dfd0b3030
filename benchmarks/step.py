"""A training step of ours against the same DiT in plain PyTorch and diffusers' DiTTransformer2DModel, with MFU.

    python benchmarks/step.py [--compile]

S/4 on 32 × 32 latents of 4 channels, 1,000 classes, 16 images a step, fp32 on one rank. The three take turns; medians.
MFU is against the best square matrix product of this device in the same run.
"""

import argparse
import statistics
import time

import torch
from diffusers import DiTTransformer2DModel

from dtrain import distributed
from dtrain.config import validate
from dtrain.models.build import build
from dtrain.training.player import Player
from dtrain.training.record.throughput import gemm_flops_per_second, training_flops

BATCH = 16


def config_of(compiled: bool):
    tree = {
        "run": {"name": "benchmark"},
        "data": {"shards": "none", "image_size": 32, "channels": 3, "batch_size": BATCH},
        "model": {"name": "dit", "size": "S/4", "num_classes": 1000},
        "deepspeed": {"zero_stage": 1},
        "train": {"steps": 1, "compile": compiled},
    }
    return validate(tree, "benchmark")


def plain(model, forward):
    """A step of AdamW with clipping, as people write it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def step():
        optimizer.zero_grad()
        forward().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--repeats", type=int, default=7)
    given = arguments.parse_args()
    distributed.set_thread_counts()
    distributed.initialize()
    config = config_of(given.compile)
    x = torch.randn(BATCH, 3, 32, 32)
    t, y = torch.randint(0, 1000, (BATCH,)), torch.randint(0, 1000, (BATCH,))

    engine = Player.of(config, micro_batch=BATCH)

    def ours():
        engine.backward((engine(x, t, y) - x).square().mean())
        engine.step(1e-4)

    ours.__name__ = "dtrain (ZeRO-1, EMA)"
    same = build(config)
    theirs = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        num_layers=12,
        sample_size=32,
        patch_size=4,
    )
    runs_same, runs_theirs = (torch.compile(m) if given.compile else m for m in (same, theirs))
    steps = {
        "dtrain, ZeRO-1 and EMA": ours,
        "the same DiT, plain PyTorch": plain(same, lambda: (runs_same(x, t, y) - x).square().mean()),
        "diffusers DiTTransformer2DModel": plain(
            theirs, lambda: (runs_theirs(x, timestep=t, class_labels=y).sample - x).square().mean()
        ),
    }
    for step in steps.values():
        step()
    times = {name: [] for name in steps}
    for _ in range(given.repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    peak, flops = gemm_flops_per_second(distributed.device(), "fp32"), training_flops(config) * BATCH
    first = statistics.median(times["dtrain, ZeRO-1 and EMA"])
    how = "compiled" if given.compile else "eager"
    print(f"{how}, {flops / 1e9:,.0f} GFLOP a step, matrix products {peak / 1e9:,.0f} GFLOP/s")
    for name, values in times.items():
        median = statistics.median(values)
        mfu, ratio = flops / median / peak, first / median
        print(f"{name:34} {1000 * median:9.1f} ms  MFU {mfu:5.1%}  dtrain is {ratio:.2f} x of it")


if __name__ == "__main__":
    main()
