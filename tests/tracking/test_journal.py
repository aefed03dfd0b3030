import errno
import json
import math
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.tracking.journal import Journal, Tail, events, read, valid


def steps_of(lines: list[dict]) -> list[tuple[int, int]]:
    return [(line["attempt"], line["step"]) for line in lines]


def write_steps(journal: Journal, steps) -> None:
    for step in steps:
        journal.append("train", step, 100 * step, {"loss": 1.0 / step})


def test_a_line_is_the_documented_object(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    before = time.time()
    assert journal.begin_attempt(0, 0, {"host": "a"}) == 1
    journal.append("eval", 400, 51200, {"fd_pixels": 0.5}, {"ema": "0.999", "n": 2000})
    attempt, line = [json.loads(text) for text in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert attempt["event"] == "attempt"
    assert attempt["context"] == {"host": "a"}
    assert before - 0.001 <= line.pop("time") <= time.time() + 0.001
    assert line == {
        "event": "eval",
        "step": 400,
        "images": 51200,
        "attempt": 1,
        "metrics": {"fd_pixels": 0.5},
        "context": {"ema": "0.999", "n": 2000},
    }


def test_non_finite_metrics_are_strict_json_and_come_back_as_floats(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    metrics = {"a": math.nan, "b": np.float32(np.inf), "c": torch.tensor(-math.inf), "d": 3, "e": np.float32(0.1)}
    journal.append("train", 1, 1, metrics, {"note": "NaN"})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "j.jsonl").read_text(), parse_constant=refuse)
    (line,) = read(tmp_path / "j.jsonl")
    assert math.isnan(line["metrics"].pop("a"))
    assert line["metrics"] == {"b": math.inf, "c": -math.inf, "d": 3, "e": float(np.float32(0.1))}
    assert line["context"] == {"note": "NaN"}  # only metrics are numbers for certain


def test_a_journal_cut_at_any_byte_loses_its_torn_line_and_no_other(tmp_path):
    path = tmp_path / "journal.jsonl"
    write_steps(Journal(path), range(1, 5))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends)
        assert [line["step"] for line in read(path)] == list(range(1, kept + 1))
        journal = Journal(path)
        write_steps(journal, [8, 9])
        journal.close()
        kept += size + 1 in ends  # only its newline was missing
        assert [line["step"] for line in read(path)] == [*range(1, kept + 1), 8, 9]
        assert path.read_bytes().startswith(whole[:size])


def test_lines_that_are_no_events_are_passed_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    write_steps(Journal(path), [1])
    good = path.read_bytes()
    foreign = [
        b"",
        b"\0\0\0\0",
        b"[1]",
        b"\xff\xfe",
        b'{"event": "train"}',
        good.strip().replace(b'"step": 1', b'"step": "1"'),
        good.strip().replace(b'"loss": 1.0', b'"loss": "much"'),
        good.strip().replace(b'"loss": 1.0', b'"loss": [1]'),
    ]
    path.write_bytes(b"\n".join([*foreign, good, *foreign]) + b"\n" + good)
    assert steps_of(read(path)) == [(0, 1), (0, 1)]


def test_a_later_attempt_makes_void_what_was_written_past_its_beginning(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    assert journal.begin_attempt(0, 0) == 1
    write_steps(journal, range(1, 6))
    journal = Journal(path)
    assert journal.begin_attempt(3, 300) == 2
    write_steps(journal, range(4, 8))
    journal = Journal(path)
    assert journal.begin_attempt(2, 200) == 3  # the newest checkpoint was damaged, an older one taken
    write_steps(journal, [3])
    assert steps_of(read(path)) == [(1, 0), (1, 1), (1, 2), (3, 2), (3, 3)]
    assert len(events(path)) == 3 + 5 + 4 + 1
    assert Journal(path).begin_attempt(3, 300) == 4


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 8), st.lists(st.integers(1, 10), max_size=5)), max_size=6), st.randoms())
def test_validity_is_the_rule_applied_line_by_line(attempts, rng):
    """Whatever the order of lines: an evaluation of an earlier attempt may write after a later attempt began."""
    lines = []
    for number, (begin, steps) in enumerate(attempts, start=1):
        lines.append({"event": "attempt", "attempt": number, "step": begin})
        lines += [{"event": "train", "attempt": number, "step": step} for step in steps]
    rng.shuffle(lines)
    expected = [
        line
        for line in lines
        if not any(
            other["event"] == "attempt" and other["attempt"] > line["attempt"] and line["step"] > other["step"]
            for other in lines
        )
    ]
    assert valid(lines) == expected


def test_what_is_written_after_training_belongs_to_the_last_attempt(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).begin_attempt(0, 0)
    Journal(path).begin_attempt(0, 0)
    evaluation = Journal(path)
    evaluation.append("eval", 7, 700)
    assert steps_of(read(path))[-1] == (2, 7)


def test_other_ranks_write_beside_it_and_only_when_they_have_something_to_say(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", rank=3)
    assert list(tmp_path.iterdir()) == []
    journal.attempt = 5
    journal.append("fault", 1, 1, context={"sample": "a"})
    assert [p.name for p in tmp_path.iterdir()] == ["journal-rank-3.jsonl"]
    assert steps_of(events(tmp_path / "journal-rank-3.jsonl")) == [(5, 1)]


@contextmanager
def file_size_limit(size: int):
    """Writes past this size of a file are cut short, as on a full disk, and the ones after them raise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_anywhere_in_a_line_loses_the_lines_it_refused_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.123)  # so that all lines are equally long
    probe = Journal(tmp_path / "probe.jsonl")
    write_steps(probe, [1, 2])
    length = (tmp_path / "probe.jsonl").stat().st_size // 2
    refused_second = 0
    for room in range(length + 1):
        path = tmp_path / f"{room}.jsonl"
        journal = Journal(path)
        write_steps(journal, [1])
        written = [1]
        with file_size_limit(path.stat().st_size + room):
            for step in (2, 3):
                try:
                    write_steps(journal, [step])
                    written.append(step)
                except OSError:
                    refused_second += step == 2
        write_steps(journal, [4, 5])
        journal.close()
        assert [line["step"] for line in read(path)] == [*written, 4, 5], f"{room} bytes of room"
    assert refused_second == length - 1  # whole, or whole but for the newline, it was not refused


def test_a_full_disk_is_told_to_the_caller():
    journal = Journal("/dev/full")
    journal.attempt = 1  # not read from the device, which has no end
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        journal.append("train", 1, 1)


WRITER = """
import sys
from dtrain.tracking.journal import Journal
journal = Journal(sys.argv[1])
journal.begin_attempt(0, 0)
for step in range(1, int(sys.argv[3]) + 1):
    journal.append(sys.argv[2], step, step, {"loss": 0.5, "pad": 1.0})
"""


def start_writer(path, event: str, count: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), event, str(count)])


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_writer_killed_at_any_moment_leaves_an_unbroken_sequence(tmp_path):
    path = tmp_path / "journal.jsonl"
    for attempt in range(1, 4):
        size = path.stat().st_size if path.exists() else 0
        writer = start_writer(path, "train", 200_000)
        try:
            wait_for(lambda size=size: path.exists() and path.stat().st_size > size + 5000)
            time.sleep(random.random() * 0.05)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        data = path.read_bytes()
        assert data.endswith(b"\n") or len(data) % mmap.PAGESIZE == 0  # a kill stops a write only between two pages
        steps = [line["step"] for line in events(path) if line["attempt"] == attempt]
        assert steps == list(range(len(steps)))
        assert len(steps) > 20


def test_lines_of_two_processes_do_not_mix(tmp_path):
    path, count = tmp_path / "journal.jsonl", 4000
    writers = [start_writer(path, event, count) for event in ("train", "other")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    # A writer that opens while another's line grows may take it for a torn one: an empty line then follows it.
    assert len(events(path)) == sum(map(bool, path.read_bytes().split(b"\n")))
    for event in ("train", "other"):
        assert [line["step"] for line in events(path) if line["event"] == event] == list(range(1, count + 1))


def test_tail_gives_each_whole_line_once_however_the_file_grows(tmp_path):
    source = tmp_path / "source.jsonl"
    write_steps(Journal(source), range(1, 40))
    data, path = source.read_bytes(), tmp_path / "growing.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    rng = random.Random(0)
    seen, at = [], 0
    while at < len(data):
        size = rng.choice([1, 7, 100, 900])
        with open(path, "ab") as f:
            f.write(data[at : at + size])
        at += size
        seen += tail.read()
        assert len(seen) == data[:at].count(b"\n")
    assert seen == read(source)
    assert tail.read() == []


def test_a_line_that_waits_for_mlflow_takes_less_than_2_kilobytes_of_memory(tmp_path):
    """In an outage of days they are many. Most of a line are the names of its metrics, which all have in common."""
    names = ["loss", "grad_norm", "lr", *(f"loss_level_{i}" for i in range(8)), "bytes_read", "bad_samples"]
    names += ["images_per_second", "step_seconds", "step_seconds_spread", "data_wait_seconds", "tflops", "mfu"]
    journal, count = Journal(tmp_path / "journal.jsonl"), 2000
    journal.begin_attempt(0, 0)
    for step in range(count):
        journal.append("train", step, step, {name: step + number / 7 for number, name in enumerate(names)})
    journal.close()
    tail = Tail(tmp_path / "journal.jsonl")
    tracemalloc.start()
    try:
        lines = tail.read()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(lines) == count + 1
    assert taken / count < 2000


def test_the_journal_needs_neither_torch_nor_mlflow():
    code = "import sys, dtrain.tracking.journal; print(sorted({'torch', 'mlflow', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=os.environ).strip() == "[]"
