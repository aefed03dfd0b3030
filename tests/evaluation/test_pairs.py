"""`dtrain pairs`: the same bytes on any number of ranks and after a kill, and a flow that trains on them."""

import hashlib
import time

import numpy as np
import pytest
import torch

import dtrain
from dtrain.data.declared import declared
from dtrain.data.fields.field import View
from dtrain.data.fields.picture import quantize
from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.reader import ShardReader
from dtrain.data.stream import StepDataset
from dtrain.evaluation import pairs
from dtrain.randomness import Draws, Purpose
from dtrain.tracking.journal import read
from tests.command_line import command, failing
from tests.digits import losses, tiny
from tests.ranks import run_ranks, start_ranks
from tests.training.runs import copied, train

N = 70


@pytest.fixture(scope="module")
def run(digits, finished_run, tmp_path_factory):
    return copied(finished_run, digits, tmp_path_factory.mktemp("runs"), "eval.batch_size=8").run.path


def _few(function, *arguments):
    """With shards of 16 samples: the function is called in a rank."""
    pairs.SHARD = 16
    return function(*arguments)


def drawn(run, place, *more, world_size=1):
    arguments = ("pairs", run, place, "-n", N, "--steps", 4, *more)
    code, said = run_ranks(_few, world_size, command, *arguments)[0]
    assert code == 0, said
    return said


def bytes_of(place):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(place.iterdir())}


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    place = tmp_path_factory.mktemp("pairs") / "one"
    drawn(run, place)
    return place


def test_any_number_of_ranks_writes_the_same_bytes(run, made, tmp_path):
    drawn(run, tmp_path / "three", world_size=3)
    assert bytes_of(tmp_path / "three") == bytes_of(made)
    assert [name for name in bytes_of(made) if name.endswith("tar")] == [f"pairs-{i:06d}.tar" for i in range(5)]


def test_after_a_kill_whole_shards_are_kept_and_the_bytes_are_the_same(run, made, tmp_path):
    place, partial = tmp_path / "killed", tmp_path / ".killed.partial"
    started = start_ranks(_few, 1, command, "pairs", run, place, "-n", N, "--steps", 4)
    end = time.monotonic() + 60
    while not (partial / "pairs-000001.tar").exists() and not place.exists():
        assert time.monotonic() < end
        time.sleep(0.002)
    for process, _ in started:
        process.kill()
        process.join()
    kept = partial / "pairs-000000.tar"
    before = kept.stat().st_mtime_ns if kept.exists() else None
    drawn(run, place)
    assert bytes_of(place) == bytes_of(made)
    assert before in (None, (place / "pairs-000000.tar").stat().st_mtime_ns)
    assert not partial.exists()
    assert "keeping what is there" in drawn(run, place)


def test_a_pair_is_of_the_noise_of_its_key_and_what_sampling_makes_of_it(run, made):
    manifest = manifests.load(made / "manifest.json")
    config = tiny(made, made, "diffusion={process: flow, coupling: data}")
    noise, x_0 = (field for field in declared(config).fields if field.name in ("noise", "drawn"))
    reader, trained = ShardReader(manifest, str(made)), dtrain.load(run)
    images = trained.sample(N, steps=4)
    assert manifest.pairs.sampling["steps"] == 4
    for number in (0, 17, N - 1):
        files = reader.read(number, (*noise.extensions, *x_0.extensions, "cls"))
        own = noise.read(files["noise.npy"], View(None))
        assert np.array_equal(own, Draws(0, 2).normal(Purpose.SAMPLE_NOISE, number, (1, 8, 8)))
        row = torch.from_numpy(x_0.read(files["x0.npy"], View(None)))
        difference = quantize(row[None])[0].permute(1, 2, 0).numpy().astype(int) - images[number]
        assert np.abs(difference).max() <= 1  # drawn in blocks of another size
        assert int(files["cls"]) == number % 10


def on_pairs(made, digits, folder, *overrides):
    coupled = "diffusion={process: flow, coupling: data}"
    holdout = f"data.holdout={digits}/holdout/manifest.json"
    return tiny(made.parent, folder, f"data.shards={made}", holdout, coupled, "data.batch_size=12", *overrides)


def test_a_batch_holds_x_0_and_the_noise_that_it_was_drawn_from(made, digits, tmp_path):
    config = on_pairs(made, digits, tmp_path)
    manifest = manifests.load(made / "manifest.json")
    batch = StepDataset(config, manifest, 0, 1, 0)[0]
    known = {tuple(Draws(0, 2).normal(Purpose.SAMPLE_NOISE, i, (1, 8, 8)).ravel().tolist()): i for i in range(N)}
    numbers = [known[tuple(row.flatten().tolist())] for row in batch["noise"]]
    assert len(set(numbers)) == 12
    assert batch["label"].tolist() == [number % 10 for number in numbers]


def test_a_training_on_pairs_is_the_same_on_two_ranks_and_resumes_bit_for_bit(made, digits, tmp_path):
    often = ("train.steps=8", "train.checkpoint_every=4")
    one = on_pairs(made, digits, tmp_path / "one", *often)
    run_ranks(train, 1, one)
    two = on_pairs(made, digits, tmp_path / "two", *often)
    run_ranks(train, 2, two)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    half = on_pairs(made, digits, tmp_path / "half", "train.steps=4", "train.checkpoint_every=4")
    run_ranks(train, 1, half)
    run_ranks(train, 1, on_pairs(made, digits, tmp_path / "half", *often))
    whole = [line["metrics"]["loss"] for line in read(half.run.path / "journal.jsonl") if line["event"] == "train"]
    assert whole == losses(one)


def test_straightness_is_evaluated_on_any_number_of_ranks(made, digits, tmp_path):
    metrics = "eval.metrics=[fd,straightness]", "eval.every=4", "train.steps=4", "eval.steps=1"
    config = on_pairs(made, digits, tmp_path, *metrics, "eval.validation_images=20", "ema.0.decay=0.5")
    run_ranks(train, 1, config)
    (line,) = [one for one in read(config.run.path / "journal.jsonl") if one["event"] == "eval"]
    assert line["metrics"]["straightness"] > 0
    code, said = run_ranks(command, 2, "evaluate", config.run.path)[0]
    assert code == 0, said
    assert f"straightness {line['metrics']['straightness']:.4f}" in said
    assert not [one for one in read(config.run.path / "journal.jsonl") if one["event"] == "validation"]


def test_what_cannot_be_is_one_line(run, made, digits, tmp_path):
    assert "holds pairs of other weights" in failing("pairs", run, made, "-n", N, "--steps", 5)
    assert "draws noise on its way" in failing("pairs", run, tmp_path / "a", "-n", 5, "--sampler", "ancestral")
    with pytest.raises(dtrain.errors.UserError, match=r"diffusion\.noise gamma begin at no"):
        pairs.check(tiny(digits, tmp_path, "diffusion.noise=gamma"))
    (tmp_path / "there").mkdir()
    assert "holds no pairs" in failing("pairs", run, tmp_path / "there", "-n", 5)
    config = on_pairs(made, digits, tmp_path, f"data.shards={digits}/train")
    with pytest.raises(dtrain.errors.UserError, match=r"has no field noise\.npy"):
        StepDataset(config, manifests.load(digits / "train" / "manifest.json"), 0, 1, 0)
    config = on_pairs(made, digits, tmp_path, "data.image_size=16", "model.patch=4")
    with pytest.raises(dtrain.errors.UserError, match="holds pairs of"):
        StepDataset(config, manifests.load(made / "manifest.json"), 0, 1, 0)
