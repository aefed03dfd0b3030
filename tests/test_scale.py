"""The benchmark of what grows with a run's size, at a hundredth of it."""

import subprocess
import sys

from benchmarks.scale import ROWS


def test_a_hundredth_of_a_large_run_stays_within_the_bounds():
    done = subprocess.run([sys.executable, "benchmarks/scale.py", "--small"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, _, *rows, last = done.stdout.splitlines()
    assert first.startswith("1,000 shards, 10 ranks, 10,000 steps")
    assert [row[:38].strip() for row in rows] == list(ROWS)
    assert last.endswith("missed: none")
