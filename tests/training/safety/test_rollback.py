"""Bad steps in a whole run: nothing moves, the run goes back and around what keeps coming, and the audit agrees."""

import json

import numpy as np
import pytest

from dtrain.config import load
from dtrain.data.order.mixture import of_run
from dtrain.data.order.skipped import Skipped
from dtrain.data.shards.manifest import load_all
from dtrain.errors import SharedError
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events, read
from dtrain.training.audit import audit, replay
from dtrain.training.safety.bad_steps import FEWEST, WINDOW, BadSteps
from tests.digits import losses, tiny
from tests.longer import longer
from tests.ranks import run_ranks
from tests.training.elastic import tensors
from tests.training.players import differing, state
from tests.training.runs import train

BATCH = 24  # of `tiny`


def observed(config, spike=(0, 0)):
    """Train; of every step on this rank: its images, learning rate, and what it moved. Then the error, if it met one.

    spike: images whose loss, and so whose gradient, is 10,000 times as large.
    """
    from dtrain.training.feed import Feed
    from dtrain.training.player import Player

    seen, current = [], []
    step, read_next, backward = Player.step, Feed.next, Player.backward

    def watched_next(self, first):
        batch = read_next(self, first)
        current[:] = batch["k"].tolist()
        return batch

    def watched_step(self, lr, *limit):
        before = state(self), self.optimizer_steps
        norm = step(self, lr, *limit)
        moved = differing(before[0], state(self))
        assert bool(moved) == (self.optimizer_steps == before[1] + 1)
        seen.append({"k": list(current), "lr": lr, "moved": len(moved), "norm": norm})
        return norm

    def spiking_backward(self, loss):
        backward(self, loss * (1e4 if any(spike[0] <= k < spike[1] for k in current) else 1))

    Player.step, Feed.next, Player.backward = watched_step, watched_next, spiking_backward
    error = None
    try:
        train(config)
    except SharedError as e:
        error = str(e)
    finally:
        Player.step, Feed.next, Player.backward = step, read_next, backward
    return seen, error


def poisoned(config, world_size, images, *spike):
    return run_ranks(observed, world_size, config, *spike, environment={"DTRAIN_FAULTS": f"nan images={images}"})


def trained_images(results, config) -> np.ndarray:
    """What the run's weights have seen, from what its ranks observed: steps gone through again count once."""
    images: dict[int, set[int]] = {}
    kept, step = {}, 0
    begins = [line["step"] for line in events(config.run.path / "journal.jsonl") if line["event"] == "attempt"]
    for ranks in zip(*(seen for seen, _ in results), strict=True):
        k = {k for rank in ranks for k in rank["k"]}
        if ranks[0]["moved"]:
            step = kept_at(kept, k, step, begins)
            images[step] = k
    return np.array(sorted(k for step in images for k in images[step]))


def kept_at(kept: dict, k: set[int], step: int, begins: list[int]) -> int:
    """The number of a step that was taken: the one it had before, where its images were trained on before."""
    key = min(k)
    if key not in kept:
        kept[key] = step + 1
    return kept[key]


def faults(config) -> list[dict]:
    return [line for line in events(config.run.path / "journal.jsonl") if line["event"] == "fault"]


def attempts(config) -> list[int]:
    return [line["step"] for line in events(config.run.path / "journal.jsonl") if line["event"] == "attempt"]


def assert_audit_agrees(config, images: np.ndarray):
    """The audit finds nothing wrong, and counts exactly the samples of `images`."""
    found = audit(RunDirectory(config.run.path))
    assert found.problems == []
    manifest = load_all(config.data)
    mixture = of_run(config.data, config.run.seed, manifest)
    last = int(images.max()) + 1
    left_out = Skipped([(k, k + 1) for k in sorted(set(range(last)) - set(images.tolist()))])
    counted = np.bincount(mixture.samples(images)[1], minlength=manifest.samples)
    assert replay(mixture, (manifest,), last, left_out)[0].tolist() == counted.tolist()
    away = last - len(images)
    assert f"{away} images left out, of steps that were refused" in found.lines or not away


@pytest.mark.parametrize("stage", [0, longer(1), 2, 3])
def test_a_nan_in_one_ranks_batch_moves_nothing_on_any_rank_and_training_goes_on(digits, tmp_path, stage):
    config = tiny(digits, tmp_path, f"deepspeed.zero_stage={stage}", "train.steps=9", "train.checkpoint_every=4")
    results = poisoned(config, 2, "96:120 rank=1")
    for seen, error in results:
        assert error is None
        assert [bool(s["moved"]) for s in seen] == [True] * 4 + [False] + [True] * 5
        assert seen[5]["lr"] == seen[4]["lr"] > seen[3]["lr"]  # the fifth step's, tried twice
    got = losses(config)
    assert len(got) == 9
    assert np.isfinite(got).all()
    assert [line["images"] for line in read(config.run.path / "journal.jsonl") if line["event"] == "train"][3:6] == [
        96,
        144,
        168,
    ]
    (fault,) = faults(config)
    assert (fault["step"], fault["images"], fault["context"]["refused"]) == (4, 120, [[96, 120]])
    manifest = load_all(config.data)
    samples = of_run(config.data, config.run.seed, manifest).samples(np.arange(96, 120))[1]
    shards = np.concatenate([[0], np.cumsum(manifest.shard_sizes)])
    named = [
        int(shards[[s.name for s in manifest.shards].index(shard.rsplit("/", 1)[1])]) + number
        for shard, numbers in fault["context"]["samples"].items()
        for number in numbers
    ]
    assert sorted(named) == sorted(samples.tolist())
    assert [e["step"] for e in events(config.run.path / "journal.jsonl") if e["event"] == "checkpoint"] == [4, 8, 9]
    assert_audit_agrees(config, trained_images(results, config))


LASTING = ["train.steps=14", "train.checkpoint_every=3", "train.bad_steps=3"]


def lasting(digits, folder, world_size, *more):
    """Six batches from image 96 on are bad: after step 4 the run goes back to step 3 twice, and around them."""
    config = tiny(digits, folder, *LASTING, *more)
    return config, poisoned(config, world_size, "96:240")


@pytest.mark.parametrize("stage", [0, longer(1), longer(2), 3])
def test_a_lasting_bad_range_is_left_out_after_going_back_and_the_audit_agrees(digits, tmp_path, stage):
    config, results = lasting(digits, tmp_path, 2, f"deepspeed.zero_stage={stage}", "data.workers=1")
    assert [error for _, error in results] == [None, None]
    assert attempts(config) == [0, 3, 3]
    assert len(losses(config)) == 14
    trained = trained_images(results, config)
    assert trained.tolist() == [*range(96), *range(240, 480)]
    assert_audit_agrees(config, trained)
    lines = read(config.run.path / "journal.jsonl")
    assert [line["images"] for line in lines if line["event"] == "train"][3:5] == [96, 264]
    assert json.loads((config.run.path / "outcome.json").read_text())["outcome"] == "finished"

    forged = (config.run.path / "journal.jsonl").read_text().replace('"skipped": [[96, 240]]', '"skipped": [[96, 216]]')
    (config.run.path / "journal.jsonl").write_text(forged)
    denied = audit(RunDirectory(config.run.path)).problems
    assert denied == ["48 images were trained on between steps 4 and 5, not 1 times 24"]


@pytest.mark.parametrize("elsewhere", [longer(("0", 1)), ("3", 2)])
def test_stopped_and_resumed_elsewhere_after_going_back_the_losses_are_those_of_a_run_not_stopped(
    digits, tmp_path, elsewhere
):
    whole, _ = lasting(digits, tmp_path / "whole", 2)
    stage, world_size = elsewhere
    lasting(digits, tmp_path / "parts", 2, "train.steps=7")
    more = tiny(digits, tmp_path / "parts", *LASTING, f"deepspeed.zero_stage={stage}")
    results = run_ranks(observed, world_size, more)  # the images are good now, and still left out
    assert min(min(s["k"]) for seen, _ in results for s in seen) == 240 + 3 * BATCH
    assert losses(more) == pytest.approx(losses(whole), abs=1e-5)
    assert audit(RunDirectory(more.run.path)).problems == []


@pytest.mark.parametrize("stage", [longer(0), longer(1), 2, longer(3)])
def test_without_a_checkpoint_a_run_goes_back_to_its_beginning(digits, tmp_path, stage):
    shape = f"deepspeed.zero_stage={stage}"
    with_checkpoint, _ = lasting(digits, tmp_path / "with", 2, shape)
    without, results = lasting(digits, tmp_path / "without", 2, shape, "train.checkpoint_every=1000")
    assert attempts(without) == [0, 0, 0]
    assert losses(without) == losses(with_checkpoint)  # bit for bit
    assert_audit_agrees(without, trained_images(results, without))


def test_a_run_that_would_go_back_too_often_ends_on_all_ranks_and_names_the_samples(digits, tmp_path):
    config = tiny(digits, tmp_path, *LASTING, "train.rollbacks=1")
    results = poisoned(config, 2, "96:100000")
    (_, first), (_, second) = results
    assert first == second
    assert "3 steps in a row after step 4 were refused, and the run has gone back 1 times already" in first
    assert "train-000000.tar: " in first
    assert "and 69 more, at optim.lr" in first
    outcome = json.loads((config.run.path / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["message"]) == ("user_error", first)


def test_importance_sampling_does_not_remember_what_was_refused(digits, tmp_path):
    config = tiny(digits, tmp_path, "train.steps=6", "diffusion.times=importance", "diffusion.timesteps=24")
    poisoned(config, 2, "48:72")
    memory = {name: value for name, value in tensors(tmp_path).items() if name.startswith("times:")}
    assert memory["times:counts"].sum() == 6 * BATCH
    assert all(np.isfinite(value).all() for value in memory.values())
    assert np.isfinite(losses(config)).all()


def bad_steps(digits, folder, *overrides) -> BadSteps:
    config = tiny(digits, folder, *overrides)
    return BadSteps(config.train, config.data.batch_size, None, None)


def test_a_norm_is_a_spike_against_the_quantile_of_recent_ones_and_not_before_there_are_enough(digits, tmp_path):
    bad = bad_steps(digits, tmp_path, "train.spike_factor=4")
    norms = np.random.default_rng(0).uniform(1, 2, 2 * WINDOW)
    for i, norm in enumerate(norms):
        if i < FEWEST:
            assert bad.limit() > 1e300
        else:
            window = np.sort(norms[max(0, i - WINDOW) : i])
            share = (window <= bad.limit() / 4).mean()
            assert 0.9 <= share <= 0.9 + 1 / len(window) + 1e-9
        assert bad.judge(norm, bad.limit(), [(0, 1)])
    limit = bad.limit()
    assert not bad.judge(limit * 1.001, limit, [(0, 1)])
    assert not bad.judge(float("nan"), limit, [(0, 1)])
    assert bad.limit() == limit  # what was refused is not typical
    again = bad_steps(digits, tmp_path, "train.spike_factor=4")
    again.load_state(json.loads(json.dumps(bad.state())))
    assert again.limit() == limit
    assert len(again.refused["main"]) == 2
    assert bad_steps(digits, tmp_path, "train.spike_factor=0").limit() > 1e300


def test_a_spike_is_refused_also_by_a_run_resumed_just_before_it(digits, tmp_path):
    steps, bad = 40, (36 * BATCH, 37 * BATCH)
    whole = tiny(digits, tmp_path / "whole", f"train.steps={steps}")
    seen, _ = run_ranks(observed, 2, whole, bad)[0]
    assert [i for i, s in enumerate(seen) if not s["moved"]] == [36]
    assert seen[36]["norm"] > 1e3
    run_ranks(observed, 2, tiny(digits, tmp_path / "parts", "train.steps=35"), bad)
    resumed = tiny(digits, tmp_path / "parts", f"train.steps={steps}", "deepspeed.zero_stage=0")
    seen, _ = run_ranks(observed, 1, resumed, bad)[0]
    assert [i for i, s in enumerate(seen) if not s["moved"]] == [1]
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)
    assert load(resumed.run.path / "config.yaml").train.spike_factor == 10
