"""A trained run to export, and the lines of an exported folder's README, run as they stand."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

from dtrain.chaos import forked
from dtrain.config import Config
from tests.digits import tiny
from tests.printed import blocks
from tests.ranks import run_ranks
from tests.training.runs import train

NO_SOCKETS = """import socket
def refuse(*_, **__): raise SystemExit("the network was touched")
socket.socket.connect = socket.getaddrinfo = refuse
"""


def trained(digits: Path, folder: Path, *overrides: str) -> Config:
    """The config of a run of 40 steps, with a sampler of 10."""
    config = tiny(digits, folder, "train.steps=40", "optim.lr=2e-3", "ema.0.decay=0.8", "eval.steps=10", *overrides)
    run_ranks(train, 1, config)
    return config


def run_readme(folder: Path, scratch: Path) -> Path:
    """The picture that the README's only block draws in a new interpreter, in the folder and without a network."""
    (block,) = blocks((folder / "README.md").read_text(encoding="utf-8"), "python")
    (scratch / "lines.py").write_text(block)
    (scratch / "sitecustomize.py").write_text(NO_SOCKETS)
    path = os.pathsep.join([str(scratch), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HOME": str(scratch / "huggingface")}
    subprocess.run([sys.executable, scratch / "lines.py"], cwd=folder, env=environment, check=True)
    return folder / "picture.png"


def run_readme_in_a_fork(folder: Path, scratch: Path) -> Path:
    """The same in a fork of the process that ranks are forked from: it has torch imported and no threads running.

    Not of this process: what computes with several threads waits for ever in a fork of one that has done so.
    """
    (block,) = blocks((folder / "README.md").read_text(encoding="utf-8"), "python")
    (scratch / "lines.py").write_text(block)
    child = forked.context.Process(target=_alone, args=(folder, scratch / "lines.py"))
    child.start()
    child.join()
    assert child.exitcode == 0
    return folder / "picture.png"


def _alone(folder: Path, lines: Path) -> None:
    os.chdir(folder)
    socket.socket.connect = socket.getaddrinfo = lambda *_, **__: sys.exit("the network was touched")
    runpy.run_path(str(lines))
