"""The whole loop on real ranks: the same losses at any stage and world size, and after a kill."""

import math

import pytest

from dtrain.run import RunDirectory
from dtrain.tracking.journal import events, read
from tests.digits import losses, tiny
from tests.longer import longer
from tests.ranks import run_ranks
from tests.training.runs import kill_when, train, train_saying_into, trained


@pytest.fixture(scope="module")
def reference(digits, tmp_path_factory):
    """Losses of 20 steps at stage 0 on one rank."""
    return trained(tiny(digits, tmp_path_factory.mktemp("reference"), "deepspeed.zero_stage=0"), 1)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_20_losses_agree_at_every_stage_and_world_size(digits, tmp_path, reference, stage, world_size):
    got = trained(tiny(digits, tmp_path, f"deepspeed.zero_stage={stage}"), world_size)
    assert len(got) == 20
    assert got == pytest.approx(reference, abs=1e-5)
    assert reference[-1] < 0.9 * reference[0]  # it learns


def test_a_run_tells_the_signal_to_noise_ratio_at_both_ends_when_it_starts(digits, tmp_path):
    config = tiny(digits, tmp_path, "train.steps=1")
    said = tmp_path / "said"
    run_ranks(train_saying_into, 2, config, said)
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    last = math.prod(1 - beta for beta in betas)
    snr = events(config.run.path / "journal.jsonl")[0]["context"]["snr"]
    assert snr == pytest.approx([0.9999 / 1e-4, last / (1 - last)], rel=1e-9)
    line = "signal-to-noise ratio: 9999 at the first timestep, 4.036e-05 at the last"
    assert said.read_text().count(line) == 1  # of two ranks


def test_micro_batches_and_loader_processes_change_nothing(digits, tmp_path, reference):
    got = trained(tiny(digits, tmp_path, "train.micro_batch=3", "data.workers=2"), 2)
    assert got == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), longer(1, 2), longer(2, 2), (3, 2)])
def test_killed_twice_and_started_again_the_losses_are_those_of_a_run_never_killed(digits, tmp_path, stage, world_size):
    overrides = [f"deepspeed.zero_stage={stage}", "train.checkpoint_every=4", "train.steps=60"]
    never_killed = trained(tiny(digits, tmp_path / "whole", *overrides), world_size)
    config = tiny(digits, tmp_path / "killed", *overrides)
    kill_when(config, world_size, 7)
    kill_when(config, world_size, 18)
    assert trained(config, world_size) == never_killed  # bit for bit
    attempts = [e for e in events(config.run.path / "journal.jsonl") if e["event"] == "attempt"]
    assert [e["attempt"] for e in attempts] == [1, 2, 3]
    assert 2 <= attempts[1]["step"] < attempts[2]["step"]
    assert RunDirectory(config.run.path).outcome() == {"outcome": "finished", "step": 60, "attempt": 3}


def test_a_finished_run_goes_on_where_more_steps_are_asked_for_and_says_what_changed(digits, tmp_path):
    whole = trained(tiny(digits, tmp_path / "whole"), 1)
    short = tiny(digits, tmp_path / "parts", "train.steps=8")
    trained(short, 1)
    assert trained(tiny(digits, tmp_path / "parts"), 1) == whole
    assert trained(tiny(digits, tmp_path / "parts"), 1) == whole  # nothing left to do
    changes = [e["context"]["changed"] for e in read(short.run.path / "journal.jsonl") if e["event"] == "config"]
    assert changes[0] == {"train.steps": [8, 20]}


def test_a_damaged_checkpoint_is_passed_over_for_the_next_older(digits, finished_run, tmp_path):
    config = tiny(digits, tmp_path, "train.checkpoint_every=5", "train.steps=10")
    trained(config, 2)
    newest = config.run.path / "checkpoints" / "step-00000010" / "rank-00001.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    more = tiny(digits, tmp_path, "train.checkpoint_every=5")
    assert trained(more, 2) == losses(finished_run)[:20]
    assert [e["step"] for e in events(config.run.path / "journal.jsonl") if e["event"] == "attempt"] == [0, 5]


def test_beside_a_damaged_checkpoint_of_a_later_step_the_newest_whole_one_stays(digits, finished_run, tmp_path):
    config = tiny(digits, tmp_path, "train.checkpoint_every=5", "train.steps=10")
    trained(config, 2)
    (config.run.path / "checkpoints" / "step-00000010" / "manifest.json").unlink()
    often = ("train.checkpoint_every=1", "train.keep_last=1")
    killed = {"DTRAIN_FAULTS": "sigkill_all at=step step=9 attempt=2"}
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train, 2, tiny(digits, tmp_path, *often), environment=killed)
    assert trained(tiny(digits, tmp_path, *often), 2) == losses(finished_run)[:20]
    attempts = [e["step"] for e in events(config.run.path / "journal.jsonl") if e["event"] == "attempt"]
    assert attempts[:2] == [0, 5]
    assert attempts[2] in (6, 7, 8)  # rank 1 may be at step 9 before rank 0 has committed 7
