"""`dtrain init` on what people have, whole: the config it writes passes the check and trains 20 steps as it is."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtrain.config import load
from dtrain.tracking.journal import events

pytestmark = pytest.mark.campaign
CIFAR10 = os.environ.get("DTRAIN_CIFAR10")


def dtrain(*words: str, out=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from dtrain.cli import main; main()", *words]
    return subprocess.run(command, stdout=out or subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def flat(folder: Path) -> str:
    """300 JPEG files of mixed sizes."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(300):
        height, width = draws.integers(60, 400, 2)
        levels = draws.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(levels).resize((int(width), int(height))).save(folder / f"{number}.jpg")
    return str(folder)


def npz(folder: Path) -> str:
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (500, 28, 28), dtype=np.uint8)
    np.savez(folder / "grey.npz", images=images, labels=draws.integers(0, 7, 500))
    return str(folder / "grey.npz")


@pytest.mark.parametrize("kind", ["digits", "cifar10", "flat", "npz"])
def test_the_config_passes_the_check_and_trains_20_steps_as_it_is(kind, tmp_path, monkeypatch):
    if kind == "cifar10" and not CIFAR10:
        pytest.skip("DTRAIN_CIFAR10 names no folder of CIFAR-10 shards")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    cifar10 = os.path.abspath(CIFAR10 or "")
    monkeypatch.chdir(tmp_path)
    data = {
        "digits": lambda: "sklearn:digits",
        "cifar10": lambda: cifar10,
        "flat": lambda: flat(tmp_path / "photos"),
        "npz": lambda: npz(tmp_path),
    }[kind]()
    with open("mine.yaml", "w") as out:
        written = dtrain("init", data, out=out)
    assert written.returncode == 0, written.stderr
    assert "# About " in Path("mine.yaml").read_text()
    checked = dtrain("train", "mine.yaml", "--check")
    assert checked.returncode == 0, checked.stderr
    more = ["eval.every=0"] if kind == "cifar10" else []  # whose 2,000 held-out pictures take a network minutes
    trained = dtrain("train", "mine.yaml", "train.steps=20", "tracking.enabled=false", *more)
    assert trained.returncode == 0, trained.stderr
    config = load("mine.yaml")
    assert events(config.run.path / "journal.jsonl")[-1]["step"] == 20
