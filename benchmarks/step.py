"""A training step of dtrain against the same DiT in plain PyTorch, with the share of its matrix products.

    python benchmarks/step.py [--quick] [--parameters 10 33] [--tokens 64 256] [--ranks 1 2] [--stages 0 1 2 3]
                              [--compile] [--repeats 9]

Models of 10 or 33 million parameters (33: S/4 and S/2) on 32 × 32 pictures of 3 channels in patches of 4 or 2, 1,000
classes, 1,024 tokens a rank and step, fp32; all with AdamW, clipping and one EMA. Ours does what `dtrain train` does:
its threads, malloc and ZeRO. The peer is as people write it, with DistributedDataParallel on two ranks; of one rank
stand diffusers' DiTTransformer2DModel, and the products of weights of the peer's step alone, beside them.

Each has processes of its own, and they take turns. Bounds: dtrain takes at most 1.05 times the peer's step at stages 0
to 2 and 1.12 times at stage 3. What is judged are the seconds in which cores worked on a step (user and system, all
ranks and threads), which other load disturbs less than the clock: the median over turns of ours divided by the peer's
in the same turn. A thread that waits for others sleeps (OMP_WAIT_POLICY), or waiting would count as work. Exits with 1
where a bound is missed.
"""

import argparse
import copy
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

DECAY = 0.9999
TOKENS = 1024  # of a rank and step
SIZES = {10: {"depth": 6, "width": 320, "heads": 5}, 33: {"depth": 12, "width": 384, "heads": 6}}
PATCHES = {64: 4, 256: 2}
BOUNDS = {0: 1.05, 1: 1.05, 2: 1.05, 3: 1.12}
Step = Callable[[], None]


class Case(NamedTuple):
    parameters: int  # millions
    tokens: int  # of a picture
    ranks: int
    stage: int
    compiled: bool

    @property
    def images(self) -> int:
        return TOKENS // self.tokens


def config_of(case: Case):
    from dtrain.config import validate

    tree = {
        "run": {"name": "benchmark"},
        "data": {"shards": "none", "image_size": 32, "channels": 3, "batch_size": case.images * case.ranks},
        "model": {"name": "dit", **SIZES[case.parameters], "patch": PATCHES[case.tokens], "num_classes": 1000},
        "ema": [{"decay": DECAY}],
        "deepspeed": {"zero_stage": case.stage},
        "train": {"steps": 1, "compile": case.compiled},
    }
    return validate(tree, "benchmark")


def batch(case: Case):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.images, 3, 32, 32, generator=generator)
    t, y = (torch.randint(0, 1000, (case.images,), generator=generator) for _ in range(2))
    return x, t, y


def ours(case: Case) -> Step:
    from dtrain import distributed
    from dtrain.training.player import Player

    distributed.prepare()
    distributed.initialize()
    player, (x, t, y) = Player.of(config_of(case), micro_batch=case.images), batch(case)
    distributed.keep_all_freed_memory()

    def step():
        player.backward((player(x, t, y) - x).square().mean())
        player.step(1e-4)

    return step


def by_hand(model: torch.nn.Module, loss: Callable[[], torch.Tensor], move: Callable[[], None]) -> Step:
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


def plain(case: Case) -> Step:
    from dtrain.models.build import build

    model, (x, t, y) = build(config_of(case)), batch(case)
    average = copy.deepcopy(model).requires_grad_(False)
    runs = model
    if case.ranks > 1:
        torch.distributed.init_process_group("gloo")
        runs = torch.nn.parallel.DistributedDataParallel(model)
    runs = torch.compile(runs) if case.compiled else runs

    @torch.no_grad()
    def move():  # tensor by tensor, as DiT's training script does
        for mean, p in zip(average.parameters(), model.parameters(), strict=True):
            mean.mul_(DECAY).add_(p.data, alpha=1 - DECAY)

    return by_hand(model, lambda: (runs(x, t, y) - x).square().mean(), move)


def diffusers(case: Case) -> Step:
    from diffusers import DiTTransformer2DModel
    from diffusers.training_utils import EMAModel

    size, (x, t, y) = SIZES[case.parameters], batch(case)
    model = DiTTransformer2DModel(
        num_attention_heads=size["heads"],
        attention_head_dim=size["width"] // size["heads"],
        in_channels=3,
        out_channels=3,
        num_layers=size["depth"],
        sample_size=32,
        patch_size=PATCHES[case.tokens],
    )
    average = EMAModel(model.parameters(), decay=DECAY)
    runs = torch.compile(model) if case.compiled else model
    return by_hand(
        model,
        lambda: (runs(x, timestep=t, class_labels=y).sample - x).square().mean(),
        lambda: average.step(model.parameters()),
    )


def products(case: Case) -> Step:
    """The products that the peer's forward and backward hand to the matrix library, of random numbers, and no more."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from dtrain.models.build import build

    aten, found = torch.ops.aten, []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, given=(), named=None):
            if function in (aten.mm.default, aten.addmm.default, aten.bmm.default):
                found.append((function, [(a.shape, a.stride()) for a in given]))
            return function(*given, **(named or {}))

    model, (x, t, y) = build(config_of(case)), batch(case)
    with Products():
        (model(x, t, y) - x).square().mean().backward()
    layouts = {layout for _, operands in found for layout in operands}
    values = {layout: torch.empty_strided(*layout).normal_() for layout in layouts}

    def step():
        for function, operands in found:
            function(*(values[layout] for layout in operands))

    return step


def serve(build: Callable[[Case], Step], case: Case, environment: dict[str, str], asked: Connection) -> None:
    """A rank of one of them: seconds of a step, those of its cores together, and the most MiB resident, when asked."""
    os.environ.update(environment)
    step = build(case)
    step(), step()
    asked.send(None)
    while asked.recv():
        started, cores = time.perf_counter(), time.process_time()
        step()
        seconds = time.perf_counter() - started, time.process_time() - cores
        with open("/proc/self/status") as status:
            most = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
        asked.send((*seconds, most / 1024))


class Contender:
    """The processes of one of them."""

    def __init__(self, build: Callable[[Case], Step], case: Case):
        from dtrain.distributed import free_port

        one_rank = case.ranks == 1
        # As launchers do; of one rank every library takes the cores there are.
        os.environ.pop("OMP_NUM_THREADS", None) if one_rank else os.environ.update(OMP_NUM_THREADS="1")
        os.environ["OMP_WAIT_POLICY"] = "passive"
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        where |= {"WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(case.ranks)}
        context, self._asking, self._processes = get_context("spawn"), [], []
        for rank in range(case.ranks):
            mine, theirs = context.Pipe()
            environment = {} if one_rank else where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._processes.append(context.Process(target=serve, args=(build, case, environment, theirs), daemon=True))
            self._processes[-1].start()
            theirs.close()
            self._asking.append(mine)

    def ready(self) -> None:
        for connection in self._asking:
            connection.recv()

    def step(self) -> tuple[float, float, float]:
        """Seconds, seconds of all cores and ranks, MiB resident on the largest rank."""
        for connection in self._asking:
            connection.send(True)
        seconds, cores, resident = zip(*[connection.recv() for connection in self._asking], strict=True)
        return max(seconds), sum(cores), max(resident)

    def close(self) -> None:
        for connection, process in zip(self._asking, self._processes, strict=True):
            connection.send(False)
            process.join()


def in_turns(builds: dict[str, Callable[[Case], Step]], case: Case, repeats: int) -> dict[str, list[tuple]]:
    """Name → what each step took."""
    contenders = {}
    for name, build in builds.items():
        contenders[name] = Contender(build, case)
        contenders[name].ready()
    found = {name: [] for name in builds}
    for _ in range(repeats):
        for name, contender in contenders.items():
            found[name].append(contender.step())
    for contender in contenders.values():
        contender.close()
    return found


def measure(case: Case, repeats: int) -> bool:
    """Print a case's lines; whether its bound holds."""
    us, peer = f"dtrain, stage {case.stage}", "plain PyTorch" if case.ranks == 1 else "plain PyTorch, DDP"
    builds = {peer: plain, us: ours}
    if case.ranks == 1 and case.stage == 1:
        builds |= {"diffusers": diffusers, "its matrix products": products}
    found = in_turns(builds, case, repeats)
    bound = BOUNDS[case.stage]
    for name, rows in found.items():
        seconds, cores, resident = (statistics.median(column) for column in zip(*rows, strict=True))
        clock, share = (
            statistics.median(row[i] / base[i] for row, base in zip(rows, found[peer], strict=True)) for i in (0, 1)
        )
        verdict = "" if name != us else f"  <= {bound} {'ok' if share <= bound else 'MISSED'}"
        where = f"{case.parameters} M, {case.tokens} tokens, {case.ranks} rank{'s' if case.ranks > 1 else ''}"
        print(
            f"{where:25} {name:20} {1000 * cores:7,.0f} ms {share:6.2f} x"
            f"  {1000 * seconds:7,.0f} ms {clock:6.2f} x  {resident:7,.0f} MiB {os.getloadavg()[0]:6.1f}{verdict}",
            flush=True,
        )
    ratios = [row[1] / base[1] for row, base in zip(found[us], found[peer], strict=True)]
    return statistics.median(ratios) <= bound


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="10 million parameters, 64 tokens, one rank, stage 1")
    arguments.add_argument("--parameters", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    arguments.add_argument("--tokens", type=int, nargs="+", choices=PATCHES, default=list(PATCHES))
    arguments.add_argument("--ranks", type=int, nargs="+", choices=[1, 2], default=[1, 2])
    arguments.add_argument("--stages", type=int, nargs="+", choices=BOUNDS, default=list(BOUNDS))
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--repeats", type=int, default=9)
    given = arguments.parse_args()
    shapes = [(10,), (64,), (1,), (1,)] if given.quick else [given.parameters, given.tokens, given.ranks, given.stages]
    how = "compiled" if given.compile else "eager"
    print(f"{how}, medians of {given.repeats}; x: of plain PyTorch in the same turn; most: resident on a rank")
    print(f"{'':46} {'of all cores':>19} {'by the clock':>20} {'most':>13} {'load':>5}")
    held = [measure(Case(*shape, given.compile), given.repeats) for shape in itertools.product(*shapes)]
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
