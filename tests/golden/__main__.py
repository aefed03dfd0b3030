"""python -m tests.golden --against COMMIT [--cases dit,unet] | --write

--against: trains the golden configs with the code of COMMIT and with the code of this work tree, on this machine, and
compares every loss, gradient norm, evaluation and final hash bit for bit. Exit code 1 where one differs.
--write: replaces figures.json by what this work tree computes. Only for a change that is meant to compute otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.golden.compare import differences
from tests.golden.runner import CASES

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FIGURES = HERE / "figures.json"


def figures_of(tree: Path, names: list[str]) -> dict:
    """What the code in `tree` computes: {machine, cases}."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    # -P: neither this folder nor the current one counts, so that `dtrain` is the one in `tree`.
    command = [sys.executable, "-P", str(HERE / "runner.py"), *names]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def against(commit: str, names: list[str]) -> int:
    """Prints a line a difference; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            was = figures_of(tree, names)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    now = figures_of(ROOT, names)
    found = differences(was["cases"], now["cases"])
    print("\n".join([*found, f"{len(was['cases']) - len(found)} of {len(was['cases'])} cases are equal bit for bit"]))
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--cases", default="", help="beginnings of names, such as dit-stage2,unet; default: all")
    given = parser.parse_args()
    chosen = [name for name in CASES if name.startswith(tuple(given.cases.split(",")))]
    if not chosen:
        parser.error(f"--cases {given.cases} is the beginning of none of: {', '.join(CASES)}")
    if given.against:
        return against(given.against, chosen)
    if given.write:
        FIGURES.write_text(json.dumps(figures_of(ROOT, list(CASES)), indent=1) + "\n")
        return 0
    parser.error("give --against COMMIT, or --write")


if __name__ == "__main__":
    sys.exit(main())
