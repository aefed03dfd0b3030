"""Under the real `deepspeed` launcher a signal to a rank or to the launcher, a `stop` file and a deadline each end in a
checkpoint and exit code 75.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from dtrain.errors import STOPPED
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events
from tests.digits import tiny
from tests.end_to_end.launched import launch
from tests.processes import processes_of

pytestmark = pytest.mark.campaign


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def wait_for_step(run: RunDirectory, attempt: int) -> None:
    end = time.monotonic() + 120
    while not [e for e in events(run.journal_file) if e["event"] == "train" and e["attempt"] == attempt]:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_signal_to_one_rank_and_a_deadline(digits, tmp_path):
    folder = tmp_path.resolve()
    config = tiny(digits, folder / "runs", "train.steps=100000", "train.checkpoint_every=100000")
    (folder / "tiny.yaml").write_text(config.dump())
    run, stopped_at = RunDirectory(config.run.path), []
    for attempt, (number, overrides) in enumerate(
        [(signal.SIGUSR2, []), (signal.SIGTERM, []), (None, ["train.deadline=00:00:25"])], start=1
    ):
        process = launch(folder, "tiny.yaml", *overrides)
        if number is not None:
            wait_for_step(run, attempt)
            ranks = [p for p in processes_of(folder) if "--local_rank=1" in command_line(p)]
            os.kill(min(ranks), number)
        assert process.wait(90) == STOPPED
        assert run.outcome()["outcome"] == "stopped"
        stopped_at.append(run.outcome()["step"])
        assert [e["step"] for e in events(run.journal_file) if e["event"] == "checkpoint"] == stopped_at
    assert stopped_at == sorted(set(stopped_at))


def test_the_stop_file_and_a_signal_to_the_node_launcher_both_end_in_a_checkpoint(digits, tmp_path):
    folder = tmp_path.resolve()
    config = tiny(digits, folder / "runs", "train.steps=100000", "train.checkpoint_every=100000")
    (folder / "tiny.yaml").write_text(config.dump())
    run = RunDirectory(config.run.path)

    process = launch(folder, "tiny.yaml")
    wait_for_step(run, attempt=1)
    run.stop_file.touch()
    assert process.wait(60) == STOPPED
    first = run.outcome()
    assert first["outcome"] == "stopped"
    assert [e["step"] for e in events(run.journal_file) if e["event"] == "checkpoint"] == [first["step"]]

    process = launch(folder, "tiny.yaml")
    wait_for_step(run, attempt=2)
    (node_launcher,) = [p for p in processes_of(folder) if "deepspeed.launcher.launch" in command_line(p)]
    os.kill(node_launcher, signal.SIGTERM)  # it signals one rank after another and masks their exit code
    process.wait(90)
    second = run.outcome()
    assert second["outcome"] == "stopped"
    assert second["step"] > first["step"]
    assert [e["step"] for e in events(run.journal_file) if e["event"] == "checkpoint"] == [
        first["step"],
        second["step"],
    ]
    assert processes_of(folder) == []
