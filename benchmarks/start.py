"""From `deepspeed …` to the first training step: ours against a bare two-rank DeepSpeed script with the same model.

python benchmarks/start.py [--repeats 5]        exit code 1 above the bound

Medians, taking turns. Beside the seconds of the clock stand those that all processes have computed until then, which
tell more on a machine that others use.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from dtrain.data.pack.pack import pack
from dtrain.distributed import free_port

BARE = """
import os, sys
import deepspeed, torch
from torch import nn
deepspeed.init_distributed()
model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2},
          "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
x = torch.randn(8, 64)
engine.backward((engine(x) - x).square().mean())
engine.step()
if torch.distributed.get_rank() == 0:
    open("first-step", "w").close()
torch.distributed.barrier()
"""
BOUND = 1.1  # of the bare script's


class Taken(NamedTuple):
    clock: float
    computed: float  # by the launcher, its children and theirs


def first_step(command: list, folder: Path, happened) -> Taken:
    """Seconds from the start of the launcher until `happened()`; then lets it end."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = time.perf_counter()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), *command],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
    while not happened():
        assert process.poll() in (None, 0), (folder / "log").read_text()
        time.sleep(0.01)
    taken = Taken(time.perf_counter() - started, _computed(process.pid))
    process.wait()
    return taken


def _computed(pid: int) -> float:
    launcher = psutil.Process(pid)
    times = [process.cpu_times() for process in [launcher, *launcher.children(recursive=True)]]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=5)
    repeats = arguments.parse_args().repeats
    root, load = Path(__file__).resolve().parent.parent, os.getloadavg()[0]
    ours, bare = [], []
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "digits"
        pack("sklearn:digits", data, holdout=360)
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / "bare.py").write_text(BARE)
                bare.append(first_step(["bare.py"], folder, (folder / "first-step").exists))
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                overrides = ["train.steps=2", "train.log_every=1", f"run.dir={folder}", f"data.shards={data}/train"]
                overrides += [f"data.holdout={data}/holdout/manifest.json", "eval.num_samples=64"]
                journal = folder / "digits" / "journal.jsonl"
                command = [root / "launch/train.py", root / "configs/digits-dit.yaml", *overrides]
                ours.append(first_step(command, folder, lambda j=journal: j.exists() and '"train"' in j.read_text()))
    print(f"seconds until the first step, medians of {repeats}, load {load:.1f}")
    print(f"{'':22}{'clock':>8}{'computed':>10}")
    a, b = (Taken(*map(statistics.median, zip(*taken, strict=True))) for taken in (ours, bare))
    ratio = a.clock / b.clock
    print(f"bare DeepSpeed script {b.clock:8.1f}{b.computed:10.1f}")
    print(f"dtrain                {a.clock:8.1f}{a.computed:10.1f}")
    passed = ratio <= BOUND
    print(f"{'':22}{ratio:6.2f} x{a.computed / b.computed:8.2f} x  <= {BOUND}  {'ok' if passed else 'MISSED'}")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
