"""What people wait for at a prompt: commands that need no torch, against importing pydantic and typer.

python benchmarks/prompt.py [REPEATS]        medians, taking turns; seconds on the clock and of the processor

Ends with 1 where a command takes more than three times what the libraries take.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.digits import pack_digits, tiny

COMMANDS = {
    "--help": ["--help"],
    "submit --dry-run": ["submit", "tiny.yaml", "--gpus-per-node", "2", "--time", "1:00:00", "--dry-run"],
    "status": ["status", "begun"],
    "config": ["config", "train"],
}
RUN = "import sys; from dtrain.cli import main; sys.argv = ['dtrain', *sys.argv[1:]]\nmain()"
LIBRARIES = "from pydantic import BaseModel; import typer"  # pydantic itself imports nothing before it is asked


def cost(code: str, arguments: list[str], folder: Path) -> tuple[float, float]:
    """(seconds on the clock, of the processor) of one process."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    started = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - started, used.ru_utime + used.ru_stime


def main(repeats: int = 9) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tiny(pack_digits(folder / "digits"), Path("runs"))
        (folder / "tiny.yaml").write_text(config.dump())
        (folder / "begun").mkdir()
        (folder / "begun/config.yaml").write_text(config.dump())
        taken: dict[str, list] = {}
        for _ in range(repeats):
            for what, arguments in ({"pydantic and typer": None} | COMMANDS).items():
                code, words = (RUN, arguments) if arguments else (LIBRARIES, [])
                taken.setdefault(what, []).append(cost(code, words, folder))
    clock, processor = (median(one[i] for one in taken["pydantic and typer"]) for i in range(2))
    slow = False
    for what, costs in taken.items():
        a, b = (median(one[i] for one in costs) for i in range(2))
        print(f"{what:20} {a:6.2f} s {a / clock:5.2f} x   processor {b:6.2f} s {b / processor:5.2f} x   <= 3")
        slow |= b > 3 * processor
    return slow


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
