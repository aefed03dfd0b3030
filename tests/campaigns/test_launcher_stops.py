"""Under the real `deepspeed` launcher a signal to one rank, or a deadline, ends in a checkpoint and exit code 75."""

import os
import signal

import pytest

from dtrain.errors import STOPPED
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events
from tests.digits import tiny
from tests.end_to_end.test_launch import launch, processes_of
from tests.end_to_end.test_stop_under_launcher import command_line, wait_for_step

pytestmark = pytest.mark.campaign


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
