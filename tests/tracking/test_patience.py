"""A journal on a real file system that is full for a while: lines wait, and none is torn, lost or doubled unsaid."""

import pytest

from dtrain.tracking import patience
from dtrain.tracking.journal import Journal, events
from dtrain.tracking.patience import PatientJournal
from tests.small_disk import small_disk


def fill(path):
    with open(path, "wb", buffering=0) as f:
        for block in (bytes(4096), b"\0"):
            while True:
                try:
                    f.write(block)
                except OSError:
                    break


def steps(path):
    return [line["step"] for line in events(path) if line["event"] == "train"]


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "size=64k"):
        yield tmp_path / "disk"


def test_lines_wait_for_room_and_then_stand_in_order(disk):
    journal = PatientJournal(disk / "journal.jsonl")
    journal.begin_attempt(0, 0)
    step = 0
    for _ in range(3):
        fill(disk / "filler")
        journal.append("train", step + 1, 0, {"loss": 1.0}, {"long": "x" * 5000})  # more than is left of the last page
        assert "bytes of a journal line were written" in journal.problem  # a part of it stands there, torn
        assert journal.unwritten == 1
        for more in range(2, 11):
            journal.append("checkpoint" if more == 5 else "train", step + more, 0, {"loss": 1.0})
        assert journal.unwritten == 10
        assert journal.problem == "No space left on device"
        (disk / "filler").unlink()
        step += 11
        journal.append("train", step, 0, {"loss": 1.0})
        assert journal.problem is None
        assert journal.unwritten == 0
    found = [line["step"] for line in events(disk / "journal.jsonl")]
    assert found == list(range(34))
    journal.close()


def test_what_still_waits_is_written_when_the_journal_is_closed(disk):
    journal = PatientJournal(disk / "journal.jsonl")
    fill(disk / "filler")
    journal.append("train", 1, 8)
    assert steps(disk / "journal.jsonl") == []
    (disk / "filler").unlink()
    journal.close()
    assert steps(disk / "journal.jsonl") == [1]


def test_of_more_lines_than_memory_is_given_for_the_oldest_go_and_the_journal_says_which(disk, monkeypatch):
    monkeypatch.setattr(patience, "MOST_WAITING", 3000)
    journal = PatientJournal(disk / "journal.jsonl")
    journal.begin_attempt(0, 0)
    fill(disk / "filler")
    for step in range(1, 101):
        journal.append("train", step, 8 * step, {"loss": 1.0})
    written = steps(disk / "journal.jsonl")  # where the file's last page had room
    assert written == list(range(1, len(written) + 1))
    assert journal.unwritten == 100 - len(written) > 60
    (disk / "filler").unlink()
    journal.append("train", 101, 8 * 101)
    kept = steps(disk / "journal.jsonl")[len(written) :]
    assert kept == list(range(kept[0], 102))
    assert 10 < len(kept) < 30  # 3,000 bytes of them
    (said,) = [line for line in events(disk / "journal.jsonl") if line["event"] == "fault"]
    first, last = len(written) + 1, kept[0] - 1
    assert said["context"]["message"] == (
        f"{last - first + 1} journal lines of steps {first} to {last} are lost: No space left on device"
    )


def test_an_attempt_that_cannot_be_written_down_does_not_begin(disk):
    fill(disk / "filler")
    for kind in (Journal, PatientJournal):
        journal = kind(disk / "journal.jsonl")
        with pytest.raises(OSError, match="No space left on device"):
            journal.begin_attempt(0, 0)
        (disk / "filler").unlink()
        journal.close()
        assert events(disk / "journal.jsonl") == []  # nor later
        fill(disk / "filler")
