"""Commands people wait for at a prompt load neither torch nor NumPy, and cost little more than their libraries."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.digits import tiny

COMMANDS = {
    "help": ["--help"],
    "submit": ["submit", "tiny.yaml", "--gpus-per-node", "2", "--time", "1:00:00", "--dry-run"],
    "status": ["status", "begun"],
}
RUN = "import sys; from dtrain.cli import main; sys.argv = ['dtrain', *sys.argv[1:]]\n"
LIBRARIES = "from pydantic import BaseModel; import typer"  # pydantic itself imports nothing before it is asked


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
    code = RUN + "try: main()\nfinally: print({'torch', 'numpy', 'deepspeed', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS[command]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_it_takes_at_most_three_times_what_importing_pydantic_and_typer_does(work, command):
    def seconds(code: str, *arguments: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
        return time.perf_counter() - started

    ratios = [seconds(RUN + "main()", *COMMANDS[command]) / seconds(LIBRARIES) for _ in range(5)]
    assert statistics.median(ratios) <= 3, ratios
