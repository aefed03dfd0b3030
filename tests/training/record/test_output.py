"""Output that cannot be written costs output: a training goes on where a log has no room or no reader."""

import os
import sys

import pytest

from dtrain.chaos.forked import fork_ranks
from dtrain.run import RunDirectory
from tests.digits import losses, tiny


def _train_into(place: str, config: str) -> None:
    """`dtrain train CONFIG` whose standard output and errors go to `place`; a closed pipe where it has no name."""
    if place:
        fd = os.open(place, os.O_WRONLY)
    else:
        reading, fd = os.pipe()
        os.close(reading)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.argv = ["dtrain", "train", config]
    from dtrain.cli import main

    main()


@pytest.mark.parametrize("place", ["/dev/full", ""], ids=["a full disk", "a closed pipe"])
def test_a_training_outlives_its_own_output(digits, finished_run, tmp_path, place):
    config = tiny(digits, tmp_path, "train.steps=6", "train.checkpoint_every=3", "eval.every=6")
    (tmp_path / "tiny.yaml").write_text(config.dump())
    processes = fork_ranks(_train_into, [(place, str(tmp_path / "tiny.yaml"))] * 2)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    run = RunDirectory(config.run.path)
    assert run.outcome()["outcome"] == "finished"
    assert (run.checkpoints / "step-00000006" / "manifest.json").is_file()
    assert losses(config) == losses(finished_run)[:6]
