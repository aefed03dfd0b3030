"""Trains the golden configs with whatever `dtrain` Python finds, and prints what they computed as JSON.

    PYTHONPATH=TREE python tests/golden/runner.py CASE [CASE ...]

It runs in work trees of other commits, so it knows only the command line, the journal and the format of checkpoints.
Ranks are forked from one process that has imported torch and DeepSpeed; each has one core, and so one thread.
"""

import hashlib
import importlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

HERE = Path(__file__).parent
PRELOADED = [
    "torch",
    "torch._dynamo",
    "torchmetrics",
    "dtrain.training.deepspeed_import",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "dtrain.training.loop",  # until it was run_training
    "dtrain.training.run_training",
    "dtrain.training.evaluation",
]


class Case(NamedTuple):
    """One training: a config, the number of ranks, and the keys that this shape changes."""

    config: str
    ranks: int = 1
    stage: int = 2
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.config}-stage{self.stage}-{self.precision}-{self.ranks}"


CASES = {
    case.name: case
    for case in [
        *(Case("dit", ranks, stage) for stage in (0, 1, 2, 3) for ranks in (1, 2)),
        *(Case("dit", 2, stage, "bf16_autocast") for stage in (0, 1, 2, 3)),
        Case("dit", 2, 2, "bf16"),
        Case("unet", 1, 0),
        Case("unet", 2, 3),
        Case("flow", 2, 1),
        Case("v", 2, 2),
        Case("x0", 2, 2),
        Case("hybrid", 2, 3),
        Case("importance", 1, 0),
        Case("importance", 2, 2),
        Case("mixture", 1, 1),
        Case("mixture", 2, 2),
    ]
}


def machine() -> dict[str, str]:
    """What bits depend on, a rank having one thread: where one of these differs, only losses are compared."""
    import torch

    about = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line
    )
    about = {key.strip(): value.strip() for key, value in about.items()}
    model = [about.get(key, "?") for key in ("model name", "cpu family", "model", "stepping")]
    return {
        "cpu": " ".join(model),
        "flags": hashlib.sha256(about.get("flags", "").encode()).hexdigest()[:12],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "cores": str(len(os.sched_getaffinity(0))),
    }


def main() -> None:
    for module in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(module)
    found = {name: figures(CASES[name]) for name in sys.argv[1:] or CASES}
    print(json.dumps({"machine": machine(), "cases": found}))


def figures(case: Case) -> dict:
    """Losses, gradient norms and evaluation step by step, and the hash of each kind of tensor at the end."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(HERE / "data", place / "data")  # an evaluation keeps its reference beside the split
        (place / "golden.yaml").write_text(yaml.safe_dump(complete(HERE / "configs" / f"{case.config}.yaml")))
        shape = [f"deepspeed.zero_stage={case.stage}", f"deepspeed.precision={case.precision}"]
        train(place, case.ranks, ["golden.yaml", *shape])
        run = place / "runs" / "golden"
        lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        steps = [line["metrics"] for line in lines if line["event"] == "train"]
        (evaluation,) = [line["metrics"] for line in lines if line["event"] == "eval"]
        (validation,) = [line["metrics"] for line in lines if line["event"] == "validation"]
        del evaluation["seconds"]
        (checkpoint,) = (run / "checkpoints").glob("step-*")
        return {
            "losses": [step["loss"] for step in steps],
            "grad_norms": [step["grad_norm"] for step in steps],
            "evaluation": evaluation | validation,
            "hashes": hashes(checkpoint),
        }


def complete(config: Path) -> dict:
    """The config's tree. A key that it lacks means what was done before the key existed, as for any older run."""
    tree = yaml.safe_load(config.read_text())
    with suppress(ImportError):  # a commit that is older than that rule has no such key either
        from dtrain.config.earlier import with_earlier_values

        tree = with_earlier_values(tree)
    return tree


def train(folder: Path, ranks: int, arguments: list[str]) -> None:
    """`dtrain train ARGUMENTS` on so many ranks in `folder`. Raises RuntimeError with what a rank said that failed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))
    started = []
    for rank in range(ranks):
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            _be_a_rank(folder, rank, ranks, port, cores[rank % len(cores)], arguments)
        started.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
    if any(codes):
        said = "\n".join(f"rank {r}: {(folder / f'rank-{r}.log').read_text()[-4000:]}" for r in range(ranks))
        raise RuntimeError(f"training {arguments} ended with {codes}\n{said}")


def _be_a_rank(folder: Path, rank: int, ranks: int, port: int, core: int, arguments: list[str]) -> None:
    """Never returns."""
    code = 1
    try:
        os.sched_setaffinity(0, {core})
        log = os.open(folder / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        os.environ.update({key: str(value) for key, value in about.items()})
        sys.argv = ["dtrain", "train", *arguments]
        from dtrain.cli import main as command

        command()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def hashes(checkpoint: Path) -> dict[str, str]:
    """Kind of state (fp32, exp_avg, exp_avg_sq, ema_0, …) → SHA-256 over its tensors, whatever pieces they lie in."""
    from safetensors.numpy import load_file

    pieces = defaultdict(dict)
    for path in sorted(checkpoint.glob("*.safetensors")):
        for key, values in load_file(path).items():
            name, start = key.rsplit("@", 1)
            pieces[name][int(start)] = values
    found = defaultdict(hashlib.sha256)
    for name in sorted(pieces):
        whole = np.concatenate([pieces[name][start] for start in sorted(pieces[name])])
        found[name.rpartition(":")[2]].update(name.encode() + whole.tobytes())
    return {kind: digest.hexdigest() for kind, digest in sorted(found.items())}


if __name__ == "__main__":
    main()
