"""`dtrain checkpoints list | verify | prune` on a run that real ranks trained."""

import math

import pytest

from dtrain.checkpoint.directory import complete, step_of
from dtrain.checkpoint.inspect import prune, table, verify
from dtrain.errors import UserError
from dtrain.run import RunDirectory
from dtrain.tracking.best import best_step, training_evaluations
from dtrain.tracking.journal import Journal
from tests.training.runs import copied


def test_checkpoints_are_listed_verified_and_pruned_without_losing_the_newest_or_the_best(
    digits, finished_run, tmp_path
):
    run = RunDirectory(copied(finished_run, digits, tmp_path).run.path)

    def steps():
        return [step_of(path) for path in complete(run.checkpoints)]

    assert steps() == [10, 20, 30, 40]
    lines = table(run).splitlines()
    assert [line.split()[0] for line in lines] == ["step", "10", "20", "30", "40"]
    assert all("complete" in line and "fd_pixels" in line for line in lines[1:])
    assert verify(run, lambda done, of: None)[0] == 0

    best = best_step(training_evaluations(run.journal_file), "fd_pixels", steps())
    with pytest.raises(UserError, match=r"no checkpoint of .* has the metric 'fid'; nothing was deleted"):
        prune(run, 1, None, "fid")
    prune(run, 1, 20, "fd_pixels")
    assert steps() == sorted({20, 40, best})

    newest = complete(run.checkpoints)[-1] / "rank-00001.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    damaged, report = verify(run, lambda done, of: None)
    assert damaged == 1
    assert "step-00000040: DAMAGED" in report
    with pytest.raises(UserError, match="the newest checkpoint is damaged, so nothing was deleted"):
        prune(run, 1, None, None)
    assert steps() == sorted({20, 40, best})


def test_the_best_is_the_lowest_distance_and_the_highest_precision(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.begin_attempt(0, 0, {})
    for step, distance, precision in ((1, math.nan, math.inf), (5, 3.0, 0.2), (10, 2.0, 0.6), (15, 2.5, 0.4)):
        journal.append("eval", step, 64 * step, {"fd_pixels": distance, "precision_pixels": precision})
    journal.close()
    assert best_step(training_evaluations(journal.path), "fd_pixels", [1, 5, 15]) == 15
    assert best_step(training_evaluations(journal.path), "precision_pixels", [1, 5, 10, 15]) == 10
    assert best_step(training_evaluations(journal.path), "fd_pixels", [1]) is None  # what is no number is not the best
    assert best_step(training_evaluations(journal.path), "kid_pixels", [5, 10, 15]) is None


def test_the_best_is_sought_among_evaluations_made_as_the_newest_was(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.begin_attempt(0, 0, {})
    for step, n, distance in ((5, 50000, 2.0), (10, 1000, 9.0), (15, 1000, 8.0), (20, 1000, 8.5)):
        how = {"n": n, "steps": 50, "artifact": f"samples/step-{step:08d}.png"}
        journal.append("eval", step, 64 * step, {"fd_pixels": distance}, how)
    journal.close()
    assert best_step(training_evaluations(journal.path), "fd_pixels", [5, 10, 15, 20]) == 15
    assert best_step(training_evaluations(journal.path), "fd_pixels", [5, 10, 20]) == 20
    assert best_step(training_evaluations(journal.path), "fd_pixels", [5]) is None
