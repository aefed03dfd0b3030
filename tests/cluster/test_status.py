"""`dtrain status` of real runs, with SLURM's queue and without one."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtrain.cluster.status import known_runs, table
from dtrain.errors import UserError
from tests.training.runs import copied


def submitted(name: str, job: int) -> None:
    """What submission leaves of a job."""
    logs = Path("runs") / name / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / f"train-{job}.sbatch").touch()


@pytest.fixture(scope="module")
def trained(digits, finished_run, tmp_path_factory):
    """A folder with two runs: finished with an evaluation, and broken off in the middle."""
    folder = tmp_path_factory.mktemp("trained")
    copied(finished_run, digits, folder / "runs", "run.name=done")
    half = copied(finished_run, digits, folder / "runs", "run.name=half", "train.steps=1000")
    (half.run.path / "outcome.json").unlink()
    return folder


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    """Those two, and one that is only submitted; no SLURM."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    submitted("later", 9)
    submitted("later", 10)
    return tmp_path


def cells(text: str) -> dict[str, dict[str, str]]:
    """Run → heading → cell, cut where the columns begin."""
    lines = text.splitlines()
    begins = [m.start() for m in re.finditer(r"(?<!\S)\S", lines[0])]
    ends = [*begins[1:], None]
    rows = [[line[b:e].strip() for b, e in zip(begins, ends, strict=True)] for line in lines]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def test_what_the_journals_say_without_slurm(work):
    shown = cells(table(known_runs([])))
    done, half, later = (shown[f"runs/{name}"] for name in ("done", "half", "later"))
    events = [json.loads(line) for line in Path("runs/done/journal.jsonl").read_text().splitlines()]
    last = [e for e in events if e["event"] == "train"][-1]["metrics"]
    fd = [e for e in events if e["event"] == "eval"][-1]["metrics"]["fd_pixels"]
    assert (done["state"], done["attempt"], done["step"], done["left"]) == ("finished", "1", "40/40", "–")
    assert done["loss"] == f"{last['loss']:.4f}"
    assert done["images/s"] == f"{last['images_per_second']:,.0f}"
    assert done["evaluation"] == f"fd_pixels {fd:.4g} at 40"
    assert (half["state"], half["step"]) == ("broke off", "40/1,000")
    events = [json.loads(line) for line in Path("runs/half/journal.jsonl").read_text().splitlines()]
    seconds = [e for e in events if e["event"] == "train"][-1]["metrics"]["step_seconds"]
    hours, minutes, rest = half["left"].split(":")
    assert int(hours) * 3600 + int(minutes) * 60 + int(rest) == round(960 * seconds)
    assert (later["state"], later["job"]) == ("not begun", "–")


def test_what_the_queue_says(work, tmp_path, monkeypatch):
    for name, job in (("half", 8), ("done", 7)):
        submitted(name, job)
    (tmp_path / "squeue").write_text(
        "#!/bin/bash\n[[ $* == *--jobs=7,8,10* ]] || exit 1\n"
        "printf '%-20s%-20s%-20s%-20s\\n' 10 PENDING 0 1:00:00 8 RUNNING 2 30:00\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    shown = cells(table(known_runs([])))
    assert shown["runs/later"]["state"] == "waiting"
    assert shown["runs/later"]["job"] == "10 pending, 1:00:00 left"
    assert (shown["runs/half"]["state"], shown["runs/half"]["requeues"]) == ("starting", "2")
    assert (shown["runs/done"]["state"], shown["runs/done"]["job"]) == ("finished", "–")


def test_a_run_is_running_while_its_process_lives(work):
    process = subprocess.Popen(
        [sys.executable, "-c", "from dtrain.lock import RunLock; import time\n"
         "RunLock(__import__('pathlib').Path('runs/half/lock')).acquire(); time.sleep(60)"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)},
    )  # fmt: skip
    end = time.monotonic() + 20
    while not Path("runs/half/lock").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert cells(table(known_runs(["half"])))["runs/half"]["state"] == "running"
    process.kill()
    process.wait()
    assert cells(table(known_runs(["runs/half"])))["runs/half"]["state"] == "broke off"


def test_names_that_are_no_runs(work, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no run at nowhere or runs/nowhere"):
        known_runs(["nowhere"])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match="there are no runs under runs/"):
        known_runs([])


@pytest.mark.skipif(not shutil.which("setpriv"), reason="there is no setpriv to take root's privileges away")
def test_a_run_that_is_anothers_is_told_in_its_line_or_in_one(work, monkeypatch):
    monkeypatch.undo()  # the PATH, for setpriv
    privileges = "-dac_override,-dac_read_search"
    command = [shutil.which("setpriv"), f"--bounding-set={privileges}", f"--inh-caps={privileges}"]
    command = [*(command if os.geteuid() == 0 else []), sys.executable, "-c", "from dtrain.cli import main; main()"]

    def answer(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=work, env=os.environ)

    (work / "runs/half/journal.jsonl").chmod(0)
    (work / "runs/done").chmod(0)
    try:
        shown = cells(answer("status").stdout)
        assert [shown[f"runs/{name}"]["state"] for name in ("done", "half")] == ["no access", "no access"]
        assert shown["runs/later"]["state"] == "not begun"
        refused = answer("checkpoints", "list", "runs/done")
        assert refused.returncode == 2
        assert refused.stderr == (
            "dtrain: cannot open runs/done/config.yaml: Permission denied; ask its owner, or name another place\n"
        )
    finally:
        (work / "runs/done").chmod(0o755)
