"""`dtrain chaos` from the command line: a report for people, and one that can fail."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.digits import tiny
from tests.longer import longer


def run(folder, *command):
    environment = os.environ | {"TMPDIR": str(folder)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def rows(report):
    return [line.split(" | ") for line in report.splitlines() if re.match(r"\| \d+ \|", line)]


CHAOS = ("-c", "from dtrain.cli import main; main()", "chaos")


def test_three_faults_and_their_report(tmp_path):
    done = run(tmp_path, *CHAOS, "--faults", "3", "--seed", "3", "--out", "report.md")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report.md: 3 of 3 survived" in done.stdout
    report = (tmp_path / "report.md").read_text()
    assert report.splitlines()[-1] == "3 of 3 survived"
    assert "--faults 3 --seed 3" in report
    assert "seed 3" in report
    table = rows(report)
    assert len(table) == 3
    for row in table:
        assert row[-1].strip(" |") == "yes"
        assert re.fullmatch(r"equal|within \de-\d\d", row[6])
        assert int(row[5]) == max(0, int(row[3]) - int(row[4]))  # steps lost
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


@pytest.mark.campaign
def test_a_product_that_takes_damaged_bytes_for_good_does_not_pass(tmp_path):
    done = run(tmp_path, "-m", "tests.chaos.broken", "chaos", "--faults", "2", "--out", "report.md")
    assert done.returncode == 1, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    assert report.splitlines()[-1] == "1 of 2 survived"
    (failed,) = [row for row in rows(report) if "**no**" in row[-1]]
    assert "an exchanged file of the newest checkpoint" in failed[1]
    assert re.search(r"went on from step \d+, the newest whole checkpoint is of \d+", failed[-1])


def those_in(folder):
    """Processes, other than this one, that work in a folder or hold one of its files open."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [process / "cwd", *(process / "fd").iterdir()]
            if any(os.readlink(link).startswith(str(folder)) for link in links) and int(process.name) != os.getpid():
                found.add(int(process.name))
        except OSError:
            continue
    return found


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@pytest.mark.campaign
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_goes_on_when_the_command_is_ended(digits, tmp_path, how):
    (tmp_path / "hours.yaml").write_text(tiny(digits, tmp_path / "runs").dump())
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, *CHAOS, "hours.yaml", "train.steps=1000000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    assert until(lambda: list(tmp_path.glob("dtrain-chaos-*/**/journal.jsonl")), 120)
    assert len(those_in(tmp_path)) > 2
    process.send_signal(how)
    assert process.wait(60) == (128 + how if how == signal.SIGTERM else -how)
    assert until(lambda: not those_in(tmp_path), 30), those_in(tmp_path)
    assert until(lambda: str(tmp_path) not in Path("/proc/mounts").read_text(), 30)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        longer(["nowhere.yaml"], "nowhere.yaml"),
        (["--ranks", "5"], "data.batch_size 24 does not divide by 5 ranks"),
        longer(["--faults", "0"], "--faults"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, what):
    done = run(tmp_path, *CHAOS, *arguments)
    assert done.returncode == 2
    assert what in done.stderr
    assert done.stderr.count("\n") == 1
