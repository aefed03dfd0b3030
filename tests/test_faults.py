"""Scheduled faults happen at their point, step, rank and attempt, and nowhere else."""

import shutil
import signal
import time

import pytest

from dtrain import faults
from dtrain.errors import UserError
from dtrain.faults import POINTS, Fault
from dtrain.tracking.journal import events
from tests.command_line import command
from tests.digits import losses, tiny
from tests.ranks import run_ranks, start_ranks
from tests.small_disk import small_disk
from tests.training.runs import train


@pytest.fixture
def armed(monkeypatch):
    def arm(schedule, rank=0, attempt=1):
        monkeypatch.setenv("DTRAIN_FAULTS", schedule)
        faults.arm(rank, attempt, [])

    yield arm
    arm("")


@pytest.mark.parametrize(
    "text",
    [
        "sigkill at=save:write step=40 rank=1 attempt=2",
        "stall at=step step=7 seconds=2.5",
        "stall at=eval",
        "nan images=240:264",
        "nan at=eval:features step=12 rank=1",
        "sigkill_workers at=step step=3",
        "sigterm at=save:stage skip=3 times=2",
        "fill at=save:fsync step=6 rank=0 'path=/a b/filler'",
    ],
)
def test_a_fault_is_read_and_written_alike(text):
    assert str(Fault.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "explode at=step",
            "'explode' is none of sigkill, sigkill_all, sigkill_workers, sigterm, stall, nan, fill, free",
        ),
        ("sigkill at=save:wite", "at=save:wite is none of load, "),
        ("sigkill at=step stpe=4", "'stpe' is none of at, step, rank"),
        ("sigkill", "at=None is none of"),
        ("fill at=step", "fill takes path=FILE"),
        ("nan at=step", "nan takes images=FIRST:LAST instead of a point"),
        ("nan images=24", "not enough values"),
        ("sigkill at=step step=x", "invalid literal"),
    ],
)
def test_a_schedule_that_cannot_be_read_is_one_line(armed, text, what):
    with pytest.raises(UserError, match="DTRAIN_FAULTS: in ") as error:
        armed(f"sigkill at=step step=9; {text}")
    assert what in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stall_happens_at_its_point_step_and_time_alone(armed):
    def slept(*where):
        started = time.monotonic()
        faults.at(*where)
        return time.monotonic() - started >= 0.2

    schedule = "stall at=save:write step=4 skip=1 seconds=0.2 rank=1 attempt=2"
    for rank, attempt in [(0, 2), (1, 1), (1, 3)]:
        armed(schedule, rank, attempt)
        faults.at("save:stage", 4)
        assert not any(slept("save:write") for _ in range(3))
    armed(schedule, 1, 2)
    assert not any(slept("save:write") for _ in range(3))  # no step is known yet
    faults.at("save:stage", 3)
    assert not any(slept("save:write") for _ in range(3))
    faults.at("save:stage", 4)
    faults.at("step", 5)  # another group's step is not the save's
    assert [slept("save:write") for _ in range(4)] == [False, True, False, False]


def test_a_range_of_images_is_poisoned_for_batches_that_meet_it(armed):
    armed("nan images=48:72")
    batches = [(first, first + 24) for first in range(0, 120, 24)]
    assert [faults.poisons(*batch) for batch in batches] == [False, False, True, False, False]
    assert [faults.poisons(first, first + 32) for first in range(0, 128, 32)] == [False, True, True, False]
    armed("nan images=48:72 times=1")
    assert [faults.poisons(*batch) for batch in [*batches, *batches]].count(True) == 1


def test_a_small_disk_is_filled_to_the_last_byte_and_no_large_one_is(armed, tmp_path):
    with small_disk(tmp_path / "disk", "size=1m"):
        armed(f"fill at=step path={tmp_path}/disk/filler; free at=save:stage path={tmp_path}/disk/filler")
        faults.at("step")
        assert shutil.disk_usage(tmp_path / "disk").free == 0
        faults.at("save:stage")
        assert shutil.disk_usage(tmp_path / "disk").free > 2**19
    with small_disk(tmp_path / "large", "size=3g"):
        armed(f"fill at=step path={tmp_path}/large/filler")
        with pytest.raises(AssertionError, match="is no small file system"):
            faults.at("step")


def test_nothing_happens_where_nothing_is_scheduled(armed):
    armed("")
    for point in POINTS:
        faults.at(point, 1)
    assert not faults.poisons(0, 1000)


@pytest.mark.parametrize(("kind", "codes"), [("sigkill", {1}), ("sigkill_all", {0, 1})])
def test_ranks_are_killed_at_the_step_and_attempt_that_are_named(digits, tmp_path, kind, codes):
    config = tiny(digits, tmp_path, "train.checkpoint_every=4")
    schedule = {"DTRAIN_FAULTS": f"{kind} at=step step=7 rank=1 attempt=1"}
    started = start_ranks(train, 2, config, environment=schedule)
    killed = set()
    for rank, (process, _) in enumerate(started):
        process.join(60)
        if process.exitcode == -signal.SIGKILL:
            killed.add(rank)
    assert killed == codes
    trained_to = [e["step"] for e in events(config.run.path / "journal.jsonl") if e["event"] == "train"]
    assert max(trained_to) in (4, 5)  # a step's line is written one step later; the rank died before step 7
    run_ranks(train, 2, config, environment=schedule)  # the second attempt passes step 7
    assert len(losses(config)) == 20


def test_a_training_that_is_armed_says_so_at_its_start_and_in_its_journal(digits, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny(digits, tmp_path, "train.steps=2").dump())
    schedule = "stall at=step step=2 seconds=0; sigkill at=step step=9"
    ((code, text),) = run_ranks(command, 1, "train", tmp_path / "tiny.yaml", environment={"DTRAIN_FAULTS": schedule})
    assert code == 0
    assert text.splitlines()[0] == f"DTRAIN_FAULTS arms faults on purpose in this run: {schedule}"
    run_ranks(command, 1, "train", tmp_path / "tiny.yaml", "train.steps=3")
    attempts = [e["context"] for e in events(tmp_path / "tiny" / "journal.jsonl") if e["event"] == "attempt"]
    assert [context.get("faults_on_purpose") for context in attempts] == [schedule, None]
