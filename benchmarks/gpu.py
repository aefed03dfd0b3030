"""How fast DiT trains on a GPU, one factor at a time, beside the same DiT in plain PyTorch.

    python benchmarks/gpu.py [--ranks N] [--minutes 5] [--out FILE]

S/2 and XL/2 on 32 × 32 latents of 4 channels, ZeRO 1, one EMA, batches that lie on the device. Around bf16, compiled
blocks and fused AdamW one of these is another at a time. Each line is written as soon as it is measured, the most
telling first, so that a run that is cut off keeps what it has; what no time is left for is left out. Columns:

    images/s    of all ranks, by the clock, over some seconds after the first steps
    nominal     model FLOPs as a share of what the GPU's maker says, in the arithmetic of the line
    measured    the same as a share of the best square matrix product in this process
    idle        share of the time between a step's first and last kernel in which none runs (torch.profiler)
    waits       how often the host waited for the device in a step (torch's own count)

Exit 1 where XL/2 in bf16 with compiled blocks is under 40 % of the nominal peak or a step waits more than once; S/2 has
a goal of 30 %. Without a GPU exit 2, but for --tiny: a small DiT on whatever is there, to try this program.
"""

import argparse
import faulthandler
import functools
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gpu_steps import Setting, config_of, ours, plain

BOUND = ("XL/2", 0.40)
GOAL = ("S/2", 0.30)
RESERVE = {"S/2": 25.0, "XL/2": 50.0, "tiny": 10.0}  # seconds that a line takes, compiling included
KERNELS, PROFILED = 10, 3  # the largest ones shown; steps that are profiled


def settings(sizes: tuple[str, str]) -> list[Setting]:
    small, large = sizes
    base, plain = Setting(small), {"precision": "bf16_autocast", "plain": True}
    return [
        base,
        Setting(large),
        Setting(large, **plain),
        Setting(small, **plain),
        base._replace(compile="eager"),
        base._replace(precision="bf16_autocast"),
        base._replace(precision="fp32"),
        base._replace(precision="fp32", tf32="all"),
        base._replace(adamw="foreach"),
        base._replace(compile="all"),
        Setting(large, compile="eager"),
    ]


class Measured(NamedTuple):
    images_per_second: float
    idle: float
    waits: int | None  # None where torch does not count them
    kernels: list[tuple[str, float]]  # (name, share of all kernels' time)


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(setting: Setting, device: torch.device, seconds: float) -> Measured:
    from dtrain import distributed
    from dtrain.training.tf32 import set_tf32

    set_tf32(setting.tf32)
    config = config_of(setting, distributed.world_size())
    step = (plain if setting.plain else ours)(setting, config, device)
    for _ in range(3):
        step()
    finish(device)
    distributed.barrier()
    started = time.perf_counter()
    step()
    finish(device)
    taken = distributed.on_rank_0(lambda: time.perf_counter() - started)
    steps = max(3, min(200, round(seconds / taken)))
    started = time.perf_counter()
    for _ in range(steps):
        step()
    finish(device)
    taken = time.perf_counter() - started
    waits = count_waits(step) if device.type == "cuda" else None
    idle, kernels = profiled(step, device)
    return Measured(config.data.batch_size * steps / taken, idle, waits, kernels)


def count_waits(step: Callable[[], None]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def profiled(step: Callable[[], None], device: torch.device) -> tuple[float, list[tuple[str, float]]]:
    """(idle share, largest kernels) of a few steps; on a CPU operators stand for kernels."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        for _ in range(PROFILED):
            step()
        finish(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [e for e in found.events() if e.device_type == kind]
    idle = idle_share((e.time_range.start, e.time_range.end) for e in events)
    times: dict[str, float] = {}
    for e in events:
        own = e.time_range.end - e.time_range.start if cuda else e.self_cpu_time_total
        times[e.name] = times.get(e.name, 0.0) + own
    largest = sorted(times.items(), key=lambda one: -one[1])[:KERNELS]
    return idle, [(name, own / (sum(times.values()) or 1.0)) for name, own in largest]


def idle_share(intervals: Iterable[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end in which no interval is."""
    busy, first, last = 0.0, None, None
    for start, end in sorted(intervals):
        if last is None:
            first = last = start
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return 1 - busy / (last - first) if last is not None and last > first else 0.0


def features(device: torch.device, images: int) -> str:
    """A network of Inception's size, with the resizing before it and alone."""
    from torchvision.models import inception_v3

    from dtrain.evaluation.features.networks import Network

    class Inception(Network):
        name, size, dimensions = "inception's size", 299, 2048

        def __init__(self):
            super().__init__(device)
            self._network = inception_v3(weights=None, init_weights=False, aux_logits=False).to(device).eval()
            self._network.fc = torch.nn.Identity()

        def forward(self, pixels):
            return self._network(pixels / 128 - 1)

    network, pictures = Inception(), torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)
    given = torch.rand(min(64, images), 3, 299, 299, device=device)
    seconds = []
    for work, repeats in ((lambda: network(pictures), 1), (lambda: network.forward(given), -(-images // len(given)))):
        with torch.inference_mode():
            work()
            finish(device)
            started = time.perf_counter()
            for _ in range(repeats):
                work()
            finish(device)
        seconds.append(time.perf_counter() - started)
    return (
        f"features of {images:,} images {seconds[0]:.2f} s, of which a network of Inception's size {seconds[1]:.2f} s"
    )


def run(given: argparse.Namespace, began: float) -> int:
    """On every rank: measure, and on rank 0 say it. The exit code."""
    from dtrain import distributed
    from dtrain.training.record.peaks import nominal_flops_per_second
    from dtrain.training.record.throughput import gemm_flops_per_second, training_flops

    distributed.prepare()
    distributed.initialize()
    device, ranks, told = distributed.device(), distributed.world_size(), distributed.rank() == 0
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"

    def say(line: str, **row) -> None:
        if told:
            print(line, flush=True)
        if told and given.out and row:
            with open(given.out, "a") as file:
                file.write(json.dumps(row) + "\n")

    say(f"{ranks} × {device_name}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}, ZeRO 1, {time.ctime()}")
    say(f"{'':41}{'images/s':>9} {'nominal':>8} {'measured':>9} {'idle':>6} {'waits':>6}")
    peaks, shares, missed = {}, {}, []
    chosen = settings(("tiny", "tiny") if given.tiny else ("S/2", "XL/2"))
    for setting in chosen if not given.tiny else dict.fromkeys(one for one in chosen if one.compile != "all"):
        left = distributed.on_rank_0(lambda: given.minutes * 60 - (time.perf_counter() - began))
        if left < RESERVE[setting.size]:
            say(f"{setting.name} left out: {given.minutes:g} minutes are over")
            continue
        try:
            found = measure(setting, device, given.seconds)
        except torch.OutOfMemoryError:
            if ranks > 1:
                raise  # the others wait in a collective: nothing can follow
            say(f"{setting.name} needs more memory than there is")
            continue
        finally:
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache() if device.type == "cuda" else None
        arithmetic = setting.precision, setting.tf32
        if arithmetic not in peaks:
            peaks[arithmetic] = gemm_flops_per_second(device, setting.precision)
        flops = found.images_per_second * training_flops(config_of(setting, ranks)) / ranks
        peak = nominal_flops_per_second(device_name, *arithmetic)
        nominal, measured = flops / peak if peak else None, flops / peaks[arithmetic]
        say(
            f"{setting.name}{found.images_per_second:9,.0f} {'-' if nominal is None else f'{nominal:.1%}':>8}"
            f" {measured:9.1%} {found.idle:6.1%} {'-' if found.waits is None else found.waits:>6}",
            **setting._asdict() | found._asdict() | {"ranks": ranks, "nominal": nominal, "measured": measured},
        )
        if setting == Setting(setting.size):
            shares[setting.size] = nominal
            for name, share in found.kernels:
                say(f"      {share:6.1%}  {name[:100]}")
            if ranks == 1 and found.waits is not None and found.waits > 1:
                missed.append(f"a step of {setting.size} made the host wait {found.waits} times, not once")
    if told:
        say(features(device, given.images))
    if given.tiny:
        return 0
    return judged(shares, missed, say)


def judged(shares: dict[str, float | None], missed: list[str], say: Callable[[str], None]) -> int:
    """Say what is kept and what is not; the exit code."""
    size, least = BOUND
    share = shares.get(size)
    if share is None:
        missed.append(f"{size} was not measured, or this GPU's nominal peak is not known")
    else:
        say(f"{size} in bf16 with compiled blocks: {share:.1%} of the nominal peak  >= {least:.0%}")
        missed += [f"{size} is under {least:.0%} of the nominal peak"] if share < least else []
    size, goal = GOAL
    if shares.get(size) is not None:
        say(f"{size}: {shares[size]:.1%}, the goal is {goal:.0%}")
    for one in missed:
        say(f"MISSED: {one}")
    return 1 if missed else 0


def rank_main(rank: int, port: int, given: argparse.Namespace, began: float) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": given.ranks, "LOCAL_WORLD_SIZE": given.ranks}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    sys.exit(prepared(given, time.perf_counter() - (time.time() - began)))


def prepared(given: argparse.Namespace, began: float) -> int:
    """The exit code; where a rank hangs, its stacks, so that nothing that is lent for minutes is held for hours."""
    faulthandler.dump_traceback_later(60 * given.minutes + 60, exit=True)
    if given.tiny:  # trace as the compiler does, and write no C++, which takes minutes
        from dtrain.models.compiled import compile_blocks
        from dtrain.training import player

        player.compile_blocks = functools.partial(compile_blocks, backend="aot_eager")
    from dtrain import distributed

    code = run(given, began)
    distributed.finalize()
    return code


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ranks", type=int, default=1)
    arguments.add_argument("--minutes", type=float, default=5.0)
    arguments.add_argument("--out", help="a file that each line is appended to, as JSON")
    arguments.add_argument("--tiny", action="store_true")
    given = arguments.parse_args()
    given.seconds, given.images = (0.2, 4) if given.tiny else (5.0, 1000)
    if not torch.cuda.is_available() and not given.tiny:
        print("no GPU is here: there is nothing to measure (--tiny tries the program without one)")
        sys.exit(2)
    if given.ranks == 1:
        sys.exit(prepared(given, time.perf_counter()))
    from dtrain import distributed

    context, port = get_context("spawn"), distributed.free_port()
    ranks = [context.Process(target=rank_main, args=(rank, port, given, time.time())) for rank in range(given.ranks)]
    for one in ranks:
        one.start()
    while any(one.is_alive() for one in ranks):
        wait([one.sentinel for one in ranks if one.is_alive()])
        if any(one.exitcode for one in ranks):  # the others wait for it for ever
            for one in ranks:
                one.terminate()
    sys.exit(max(abs(one.exitcode) for one in ranks))


if __name__ == "__main__":
    main()
