"""`dtrain chaos` from the command line: a report for people, and one that can fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(folder, *command):
    environment = os.environ | {"TMPDIR": str(folder)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def rows(report):
    return [line.split(" | ") for line in report.splitlines() if re.match(r"\| \d+ \|", line)]


CHAOS = ("-c", "from dtrain.cli import main; main()", "chaos")


def test_four_faults_and_their_report(tmp_path):
    done = run(tmp_path, *CHAOS, "--faults", "4", "--seed", "3", "--out", "report.md")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report.md: 4 of 4 survived" in done.stdout
    report = (tmp_path / "report.md").read_text()
    assert report.splitlines()[-1] == "4 of 4 survived"
    assert "--faults 4 --seed 3" in report
    assert "seed 3" in report
    table = rows(report)
    assert len(table) == 4
    for row in table:
        assert row[-1].strip(" |") == "yes"
        assert re.fullmatch(r"equal|within \de-\d\d", row[6])
        assert int(row[5]) == max(0, int(row[3]) - int(row[4]))  # steps lost
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_a_product_that_takes_damaged_bytes_for_good_does_not_pass(tmp_path):
    done = run(tmp_path, "-m", "tests.chaos.broken", "chaos", "--faults", "2", "--out", "report.md")
    assert done.returncode == 1, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    assert report.splitlines()[-1] == "1 of 2 survived"
    (failed,) = [row for row in rows(report) if "**no**" in row[-1]]
    assert "an exchanged file of the newest checkpoint" in failed[1]
    assert re.search(r"went on from step \d+, the newest whole checkpoint is of \d+", failed[-1])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["--ranks", "5"], "data.batch_size 24 does not divide by 5 ranks"),
        (["--faults", "0"], "--faults"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, what):
    done = run(tmp_path, *CHAOS, *arguments)
    assert done.returncode == 2
    assert what in done.stderr
    assert done.stderr.count("\n") == 1
