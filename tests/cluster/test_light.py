"""Commands people wait for at a prompt load neither torch nor NumPy; benchmarks/prompt.py times them."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.prompt import COMMANDS, RUN
from tests.digits import tiny


@pytest.fixture
def work(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent.parent))
    config = tiny(digits, Path("runs"))
    Path("tiny.yaml").write_text(config.dump())
    Path("begun").mkdir()
    Path("begun/config.yaml").write_text(config.dump())


@pytest.mark.parametrize("command", COMMANDS)
def test_neither_torch_nor_numpy_is_loaded(work, command):
    code = f"try:\n exec({RUN!r})\nfinally: print({{'torch', 'numpy', 'deepspeed', 'mlflow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS[command]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
