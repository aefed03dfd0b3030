"""From `deepspeed …` to the first training step: ours against a bare two-rank DeepSpeed script with the same model.

python benchmarks/start.py        (after `make demo`, which packs the digits); medians of three, taking turns
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
REPEATS = 3


def first_step(command: list, folder: Path, happened) -> float:
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
    taken = time.perf_counter() - started
    process.wait()
    return taken


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    ours, bare = [], []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "bare.py").write_text(BARE)
            bare.append(first_step(["bare.py"], folder, (folder / "first-step").exists))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data = root / "data/digits"
            overrides = ["train.steps=2", "train.log_every=1", f"run.dir={folder}", f"data.shards={data}/train"]
            overrides += [f"data.holdout={data}/holdout/manifest.json"]
            journal = folder / "digits" / "journal.jsonl"
            command = [root / "launch/train.py", root / "configs/digits-dit.yaml", *overrides, "eval.num_samples=64"]
            ours.append(first_step(command, folder, lambda j=journal: j.exists() and '"train"' in j.read_text()))
    a, b = statistics.median(ours), statistics.median(bare)
    print(f"bare DeepSpeed script  {b:6.1f} s\ndtrain                 {a:6.1f} s  {a / b:.2f} x  <= 1.2")


if __name__ == "__main__":
    main()
