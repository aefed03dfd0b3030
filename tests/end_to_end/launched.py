"""Trainings under the real `deepspeed` launcher."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DEEPSPEED = Path(sys.executable).parent / "deepspeed"


def launch(folder: Path, *arguments: str, script: str = "launch/train.py", ranks: int = 2) -> subprocess.Popen:
    """`deepspeed launch/train.py …` in a process group of its own, its output in launcher.log."""
    environment = os.environ | {"PATH": f"{DEEPSPEED.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [DEEPSPEED, "--num_accelerators", str(ranks), "--master_port", str(port()), ROOT / script, *arguments]
    with open(folder / "launcher.log", "a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def port() -> int:
    from dtrain.distributed import free_port

    return free_port()
