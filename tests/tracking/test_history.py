"""What is kept of a journal, against what reading all of it tells; and which reads a real training makes."""

import os
import random
import sys
from itertools import groupby

import pytest

from dtrain.tracking.history import KEPT, History
from dtrain.tracking.journal import ENDS, Journal, Tail, events, last_line, outline, stride, valid
from tests.digits import tiny
from tests.ranks import run_ranks

OTHERS = ("eval", "eval_failed", "checkpoint", "goodput", "config")


def written(path, seed: int, torn: bool = True) -> None:
    """Attempts that go back to earlier steps, lines of all kinds, and some that a crash cut off."""
    rng, journal, step = random.Random(seed), Journal(path), 0
    for _ in range(rng.randint(1, 5)):
        step = rng.randint(0, step)
        journal.begin_attempt(step, 8 * step)
        for _ in range(rng.randint(0, 40)):
            step += 1
            journal.append("train", step, 8 * step, {"loss": rng.random(), "pad": 1e-300})
            if rng.random() < 0.2:
                journal.append(rng.choice(OTHERS), step, 8 * step, {"fd_pixels": rng.random()}, {"note": "train"})
            if torn and rng.random() < 0.1:
                with path.open("ab") as file:
                    file.write(rng.choice([b'{"event": "train", "step": 3', b'{"event": "ev', b"\n\n", b"{}\n"]))
                number, journal = journal.attempt, Journal(path)  # as another process, which finds a torn end
                journal.attempt = number


def thinned(lines: list[dict], every: int) -> list[dict]:
    found = []
    for train, some in groupby(lines, key=lambda line: line["event"] == "train"):
        some = list(some)
        found += [line for n, line in enumerate(some, 1) if n % every == 0 or n == len(some)] if train else some
    return found


@pytest.mark.parametrize("seed", range(20))
def test_of_curves_each_nth_line_and_the_last_is_read_and_all_else(tmp_path, seed, monkeypatch):
    monkeypatch.setattr("dtrain.tracking.journal._CHUNK", random.Random(seed).choice([64, 400, 1000, 1 << 18]))
    path = tmp_path / "journal.jsonl"
    written(path, seed, torn=False)
    for every in (1, 2, 3, 7, ENDS):
        assert Tail(path, every=every).read() == thinned(events(path), every)


@pytest.mark.parametrize("seed", range(20))
def test_lines_that_are_passed_over_hide_no_torn_one_and_no_other_event(tmp_path, seed, monkeypatch):
    monkeypatch.setattr("dtrain.tracking.journal._CHUNK", random.Random(seed).choice([64, 150, 1000, 1 << 18]))
    path = tmp_path / "journal.jsonl"
    written(path, seed)
    whole, sparse = Tail(path), Tail(path, every=5)
    lines, few = whole.read(), sparse.read()
    assert sparse.left_out == whole.left_out
    assert [x for x in few if x["event"] != "train"] == [x for x in lines if x["event"] != "train"]
    assert all(line in lines for line in few)
    assert few[-1] == lines[-1] == last_line(path)


def test_a_tail_that_passes_lines_over_goes_on_where_it_was_in_pieces_too(tmp_path):
    path, grown = tmp_path / "journal.jsonl", tmp_path / "grown.jsonl"
    written(path, 3)
    data, rng, at = path.read_bytes(), random.Random(0), 0
    tail, parts = Tail(grown, every=4), Tail(path)
    seen: list[dict] = []
    while at < len(data):
        at += rng.choice([1, 30, 500, 3000])
        grown.write_bytes(data[:at])
        seen += tail.read()
    others = [line for line in events(path) if line["event"] != "train"]
    assert [line for line in seen if line["event"] != "train"] == others
    assert seen[-1] == events(path)[-1]
    in_pieces = [line for lines in iter(lambda: parts.read(3), []) for line in lines]
    assert in_pieces == events(path)


def test_long_journals_are_read_with_a_bounded_number_of_lines(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert stride(path, 1000) == 1
    path.write_bytes(b"x" * 999)
    assert stride(path, 1000) == 1
    path.write_bytes(b"x" * 10_500)
    assert stride(path, 1000) == 11


@pytest.mark.parametrize("seed", range(20))
def test_a_history_knows_what_the_whole_journal_says_read_or_told_line_by_line(tmp_path, seed):
    path = tmp_path / "journal.jsonl"
    written(path, seed)
    lines, told = events(path), History()
    for line in lines:
        told.add(line)
    newest = max(line["attempt"] for line in lines)
    reach = max(x["step"] for x in lines if x["attempt"] == newest and x["event"] in ("attempt", "train", "checkpoint"))
    for history in (told, History.read(path)):
        assert history.attempt == newest
        assert [history.lost_steps(step) for step in (0, max(0, reach - 1), reach, reach + 1)] == [
            reach,
            min(reach, 1),
            0,
            0,
        ]
        for event in KEPT:
            assert history.counting(event) == [line for line in valid(lines) if line["event"] == event]
    assert len(outline(path)) <= len(lines)


def train_and_watch(config):
    """(journal's size at each time that it was opened to be read, its bytes at the end)."""
    from dtrain.training.run_training import train

    path, sizes = config.run.path / "journal.jsonl", []

    def hook(event, arguments):
        if event == "open" and str(arguments[0]) == str(path) and not arguments[2] & os.O_ACCMODE:
            sizes.append(path.stat().st_size if path.exists() else 0)

    sys.addaudithook(hook)
    train(config)
    return list(sizes), path.read_bytes()


def test_a_training_reads_its_journal_before_its_first_step_and_in_no_step(digits, tmp_path):
    """With what asks for evaluations at each save, and once more where it goes on."""
    more = ("train.checkpoint_every=2", "train.keep_best=fd_pixels", "eval.every=2", "eval.features=pixels")
    began = 0
    for steps in (6, 12):
        ((sizes, data),) = run_ranks(train_and_watch, 1, tiny(digits, tmp_path, *more, f"train.steps={steps}"))
        first = data.index(b'{"event": "train"', began)
        assert data.count(b'{"event": "eval"', began) == 3
        assert 1 <= len(sizes) <= 3
        assert max(sizes) <= first
        began = len(data)
