"""Data workers that die, fail or find no room: one line, no step lost, and the run goes on exactly where it was."""

import os
import re
import signal
import time

import pytest

from dtrain.errors import FAILED
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events
from tests.command_line import command
from tests.digits import losses, tiny
from tests.processes import children
from tests.ranks import join_ranks, run_ranks, start_ranks
from tests.shared_memory import needs_root, own_shared_memory
from tests.training.runs import train, trained, wait_for_step

STEPS = "train.steps=60"


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The losses of 60 steps on two ranks that nothing disturbs."""
    return trained(tiny(digits, tmp_path_factory.mktemp("whole"), STEPS, "data.workers=1"), 2)


def disturb_workers(dying_at=None, failing_at=None):
    """From now on each data worker of rank 1 kills itself at batch `dying_at`, and raises at batch `failing_at`."""
    from dtrain.data.stream import StepDataset

    rank, read = os.getpid(), StepDataset.read

    def disturbed(self, index):
        if self.rank == 1 and os.getpid() != rank:
            if index == dying_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if index == failing_at:
                raise KeyError("a mistake in the program")
        return read(self, index)

    StepDataset.read = disturbed


def train_saying_how_it_ended(config, dying_at=None, failing_at=None):
    """(kind of the error, its words), or None."""
    from dtrain.errors import SharedFailure, UserError
    from dtrain.training.run_training import train as run_training

    disturb_workers(dying_at, failing_at)
    try:
        run_training(config)
    except (UserError, SharedFailure) as e:
        return type(e).__name__, str(e)


def outcome(config):
    return RunDirectory(config.run.path).outcome()


def saved(config) -> list[int]:
    return [e["step"] for e in events(config.run.path / "journal.jsonl") if e["event"] == "checkpoint"]


def test_a_training_goes_on_when_one_of_its_workers_is_killed_and_the_journal_says_so(digits, tmp_path, whole):
    config = tiny(digits, tmp_path, STEPS, "data.workers=1")
    started = start_ranks(train, 2, config)
    wait_for_step(config, 10)
    for worker in children(started[1][0].pid):
        os.kill(worker, signal.SIGKILL)
    join_ranks(started)
    assert losses(config) == whole  # bit for bit
    (fault,) = [e for e in events(config.run.path / "journal-rank-1.jsonl") if e["event"] == "fault"]
    assert fault["context"]["message"].startswith("a data worker of rank 1 was killed by SIGKILL")
    assert outcome(config)["outcome"] == "finished"


def dying_command(*arguments):
    disturb_workers(dying_at=20)
    return command(*arguments)


def test_workers_that_something_keeps_killing_end_all_ranks_in_one_line_with_a_checkpoint_as_a_crash(
    digits, tmp_path, whole
):
    config = tiny(digits, tmp_path / "runs", STEPS, "data.workers=1", "deepspeed.zero_stage=2")
    (tmp_path / "tiny.yaml").write_text(config.dump())
    results = run_ranks(dying_command, 2, "train", tmp_path / "tiny.yaml")
    assert [code for code, _ in results] == [FAILED, FAILED]
    said = "".join(text for _, text in results)
    (line,) = re.findall("dtrain: (.*)", said)
    assert line.startswith("data workers of rank 1 died 3 times within 100 batches; the last one was killed by SIGKILL")
    assert "Traceback" not in said + (config.run.path / "logs/rank-1.log").read_text()
    step = outcome(config)["step"]
    assert 18 <= step <= 20  # two batches are made ahead of the one that kills
    assert outcome(config) == {"outcome": "crashed", "step": step, "message": line}
    assert saved(config) == [step]
    run_ranks(train, 2, config)  # as a requeued job does
    assert losses(config) == pytest.approx(whole, abs=1e-5)
    assert [e["step"] for e in events(config.run.path / "journal.jsonl") if e["event"] == "attempt"] == [0, step]


def test_a_failure_in_a_worker_is_one_line_and_its_traceback_lies_in_the_logs(digits, tmp_path, whole):
    config = tiny(digits, tmp_path, STEPS, "data.workers=1", "train.checkpoint_every=15")
    first, second = run_ranks(train_saying_how_it_ended, 2, config, None, 15)
    path = config.run.path / "logs/rank-1.traceback"
    said = f"a batch could not be made: KeyError: 'a mistake in the program' (rank 1; its traceback is in {path})"
    assert first == second == ("SharedFailure", said)
    assert "in disturbed" in path.read_text()
    assert saved(config) == [15]  # which was due, and is not saved twice
    run_ranks(train, 2, config)
    assert losses(config) == whole


def command_in(size, *arguments):
    """`dtrain …` on a rank with a /dev/shm of its own."""
    own_shared_memory(size)
    return command(*arguments)


@needs_root
def test_too_small_a_dev_shm_is_refused_before_anything_is_written(digits, tmp_path):
    config = tiny(digits, tmp_path / "runs", "data.workers=4", "data.batch_size=1440")
    (tmp_path / "tiny.yaml").write_text(config.dump())
    results = run_ranks(command_in, 2, "1m", "train", tmp_path / "tiny.yaml")
    assert [code for code, _ in results] == [2, 2]
    (line,) = [line for _, text in results for line in text.splitlines()]
    assert "has 1.0 MiB free, and batches made ahead take up to" in line
    assert all(word in line for word in ("--shm-size=1g", "--ipc=host", "data.workers=0"))
    assert not (tmp_path / "runs").exists()
    assert run_ranks(command_in, 2, "1m", "train", tmp_path / "tiny.yaml", "data.workers=0", "train.steps=1")[0][0] == 0


def train_in(size, config):
    own_shared_memory(size)
    started = time.monotonic()
    return train_saying_how_it_ended(config), time.monotonic() - started


@needs_root
def test_a_dev_shm_that_fills_up_ends_all_ranks_in_seconds_with_a_checkpoint(digits, tmp_path):
    config = tiny(digits, tmp_path, "train.steps=100000", "train.checkpoint_every=100000", "data.workers=1")
    started = start_ranks(train_in, 2, "1m", config)
    wait_for_step(config, 10)
    with open(f"/proc/{started[0][0].pid}/root/dev/shm/another program's", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            filled = time.monotonic()
    (first, _), (second, _) = join_ranks(started)
    assert time.monotonic() - filled < 20
    assert first == second
    kind, said = first
    assert kind == "SharedFailure"  # it was large enough at the start: starting again may do
    assert "/dev/shm" in said
    assert "is full (No space left on device)" in said
    step = outcome(config)["step"]
    assert outcome(config)["outcome"] == "crashed"
    assert saved(config) == [step]
    assert step == max(e["step"] for e in events(config.run.path / "journal.jsonl") if e["event"] == "train")
