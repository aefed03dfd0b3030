"""A training step of ours against the same DiT in plain PyTorch and diffusers' DiTTransformer2DModel, with MFU.

    python benchmarks/step.py [--compile]

S/4 on 32 × 32 pictures of 3 channels, 1,000 classes, 16 images a step, fp32 on one rank; all with AdamW, clipping and
one EMA. Each has a process of its own: ours sets what `dtrain train` sets (threads, malloc), the others are as PyTorch
leaves them. They take turns; medians. The seconds of all cores are those in which a core worked on the step: another
load on the machine disturbs them less. MFU is against the best square matrix product of this device in the same run.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

BATCH = 16
DECAY = 0.9999


def config_of(compiled: bool):
    from dtrain.config import validate

    tree = {
        "run": {"name": "benchmark"},
        "data": {"shards": "none", "image_size": 32, "channels": 3, "batch_size": BATCH},
        "model": {"name": "dit", "size": "S/4", "num_classes": 1000},
        "ema": [{"decay": DECAY}],
        "deepspeed": {"zero_stage": 1},
        "train": {"steps": 1, "compile": compiled},
    }
    return validate(tree, "benchmark")


def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32, generator=generator)
    t, y = (torch.randint(0, 1000, (BATCH,), generator=generator) for _ in range(2))
    return x, t, y


def ours(compiled: bool) -> Callable[[], None]:
    from dtrain import distributed
    from dtrain.training.player import Player

    distributed.prepare()
    distributed.initialize()
    player, (x, t, y) = Player.of(config_of(compiled), micro_batch=BATCH), batch()

    def step():
        player.backward((player(x, t, y) - x).square().mean())
        player.step(1e-4)

    return step


def by_hand(model: torch.nn.Module, loss: Callable[[], torch.Tensor], move: Callable[[], None]) -> Callable[[], None]:
    """A step of AdamW with clipping, as people write it; then the average moves."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def step():
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        move()

    return step


def plain(compiled: bool) -> Callable[[], None]:
    from dtrain.models.build import build

    model, (x, t, y) = build(config_of(compiled)), batch()
    average = copy.deepcopy(model).requires_grad_(False)
    runs = torch.compile(model) if compiled else model

    @torch.no_grad()
    def move():  # DiT's `update_ema`
        for mean, p in zip(average.parameters(), model.parameters(), strict=True):
            mean.mul_(DECAY).add_(p.data, alpha=1 - DECAY)

    return by_hand(model, lambda: (runs(x, t, y) - x).square().mean(), move)


def diffusers(compiled: bool) -> Callable[[], None]:
    from diffusers import DiTTransformer2DModel
    from diffusers.training_utils import EMAModel

    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        num_layers=12,
        sample_size=32,
        patch_size=4,
    )
    x, t, y = batch()
    average = EMAModel(model.parameters(), decay=DECAY)
    runs = torch.compile(model) if compiled else model
    return by_hand(
        model,
        lambda: (runs(x, timestep=t, class_labels=y).sample - x).square().mean(),
        lambda: average.step(model.parameters()),
    )


STEPS = {
    "dtrain, ZeRO-1 and EMA": ours,
    "the same DiT, plain PyTorch": plain,
    "diffusers DiTTransformer2DModel": diffusers,
}


def serve(build: Callable[[bool], Callable[[], None]], compiled: bool, asked: Connection) -> None:
    """A process of one of them: seconds of a step, those of its cores together, and resident MiB, whenever asked."""
    import psutil

    step = build(compiled)
    step()
    asked.send(None)
    while asked.recv():
        started, cores = time.perf_counter(), time.process_time()
        step()
        seconds = time.perf_counter() - started, time.process_time() - cores
        asked.send((*seconds, psutil.Process().memory_info().rss / 2**20))


def in_turns(steps: dict[str, Callable], compiled: bool, repeats: int) -> dict[str, list[tuple[float, float, float]]]:
    """Name → (seconds, seconds of all cores, resident MiB) of each step."""
    context, asking, processes = get_context("spawn"), {}, []
    for name, build in steps.items():
        asking[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(build, compiled, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        asking[name].recv()
    found = {name: [] for name in steps}
    for _ in range(repeats):
        for name, connection in asking.items():
            connection.send(True)
            found[name].append(connection.recv())
    for connection, process in zip(asking.values(), processes, strict=True):
        connection.send(False)
        process.join()
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--repeats", type=int, default=7)
    given = arguments.parse_args()
    found = in_turns(STEPS, given.compile, given.repeats)
    from dtrain import distributed
    from dtrain.training.record.throughput import gemm_flops_per_second, training_flops

    distributed.set_thread_counts()
    peak = gemm_flops_per_second(distributed.device(), "fp32")
    flops = training_flops(config_of(given.compile)) * BATCH
    how = "compiled" if given.compile else "eager"
    print(
        f"{how}, {flops / 1e9:,.0f} GFLOP a step, matrix products {peak / 1e9:,.0f} GFLOP/s, "
        f"load {os.getloadavg()[0]:.1f}, medians of {given.repeats}"
    )
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    first, first_cores, _ = next(iter(medians.values()))
    print(
        f"{'':34} {'a step':>9}  {'dtrain is':>9}  {'MFU':>6}  {'of all cores':>12}  {'dtrain is':>9}  {'resident':>11}"
    )
    for name, (seconds, cores, resident) in medians.items():
        print(
            f"{name:34} {1000 * seconds:6,.0f} ms  {first / seconds:6.2f} x  {flops / seconds / peak:7.1%}"
            f"  {1000 * cores:9,.0f} ms  {first_cores / cores:6.2f} x  {resident:7,.0f} MiB"
        )


if __name__ == "__main__":
    main()
