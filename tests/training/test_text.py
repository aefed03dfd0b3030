"""A training told in words: alike on one rank and two and at every ZeRO stage, resumed, evaluated and asked."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import dtrain
from dtrain.data.pack.pack import pack
from dtrain.data.pack.source import Choice
from dtrain.tracking.journal import read
from tests.command_line import command
from tests.digits import losses, tiny
from tests.longer import longer
from tests.ranks import run_ranks
from tests.training.runs import train, trained

WORDS = (
    *("data.image_size=16", "data.streams=1", "model.num_classes=0", "model.patch=4", "train.steps=6"),
    *(
        "conditions.text.length=12",
        "conditions.text.width=32",
        "conditions.text.depth=1",
        "conditions.text.dropout=0.5",
    ),
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    pack("sklearn:digit-pairs", folder / "all", holdout=48, choice=Choice(split="test"))
    return folder / "all"


def words(pairs, folder, *overrides):
    return tiny(pairs, folder, *WORDS, *overrides)


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory):
    """On one rank, with checkpoints and evaluations at 3 and 6."""
    folder = tmp_path_factory.mktemp("words")
    config = words(pairs, folder, "train.checkpoint_every=3", "eval.every=3", "eval.guidance=2", "eval.steps=2")
    trained(config, 1)
    return config


def evaluations(config):
    lines = read(config.run.path / "journal.jsonl")
    return [line["metrics"]["fd_pixels"] for line in lines if line["event"] == "eval"]


@pytest.mark.parametrize("stage", [longer(0), longer(1), 2, 3])
def test_the_losses_are_equal_on_one_rank_and_two(run, pairs, tmp_path, stage):
    config = words(
        *(pairs, tmp_path, f"deepspeed.zero_stage={stage}", "train.checkpoint_every=3"),
        *("eval.every=3", "eval.guidance=2", "eval.steps=2"),
    )
    assert np.allclose(trained(config, 2), losses(run), rtol=0, atol=1e-5)
    assert np.allclose(evaluations(config), evaluations(run), rtol=1e-3)
    line = next(line for line in read(config.run.path / "journal.jsonl") if line["event"] == "train")
    assert line["metrics"]["captions_truncated"] == 24  # all captions have more than 12 bytes


def test_a_run_that_was_killed_goes_on_bit_for_bit(run, pairs, tmp_path):
    config = words(pairs, tmp_path, "train.checkpoint_every=3")
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train, 1, config, environment={"DTRAIN_FAULTS": "sigkill at=step step=5"})
    run_ranks(train, 1, config)
    assert losses(config) == losses(run)


def test_a_run_is_asked_by_prompts(run, tmp_path):
    """By the command and in Python alike; each prompt in turn, and a picture is a function of its words."""
    asked = ["the digit one left of the digit two", "the digit nine left of the digit four"]
    (tmp_path / "prompts.txt").write_text("\n".join(asked) + "\n\n")
    place, settings = str(run.run.path), ("--steps", "2", "--guidance", "2")
    results = run_ranks(
        command,
        1,
        "sample",
        place,
        "--prompts",
        tmp_path / "prompts.txt",
        "--n",
        4,
        "--out",
        tmp_path / "a.npz",
        *settings,
    )
    assert results[0][0] == 0, results
    drawn = np.load(tmp_path / "a.npz")
    assert drawn["prompts"].tolist() == asked * 2
    model = dtrain.load(place)
    own = model.sample(4, prompts=asked, steps=2, guidance=2)
    assert np.array_equal(drawn["images"], own)
    assert np.array_equal(model.sample(prompts=asked[0], steps=2, guidance=2), own[:1])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.model.named_parameters():  # six steps have hardly begun to attend
        if "cross.proj" in name or "final_layer" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    own = model.sample(4, prompts=asked, steps=2, guidance=2)
    for other in (
        model.sample(4, steps=2),
        model.sample(4, prompts=[asked[1]] * 4, steps=2, guidance=2),
        model.sample(4, prompts=asked, steps=2, guidance=2, negative_prompt="the digit one"),
    ):
        assert not np.array_equal(own, other)


def test_prompts_stand_below_the_pictures_and_in_the_table(run, tmp_path):
    place = str(run.run.path)
    for out in ("grid.png", "folder"):
        results = run_ranks(
            command, 1, "sample", place, "--prompt", "a one", "--prompt", "a two", "--steps", 1, "--out", tmp_path / out
        )
        assert results[0][0] == 0, results
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[1] == 2 * 144 + 1
    below = grid[144:, :144, 0]
    assert below.max() > 200  # letters
    assert not np.array_equal(below, grid[144:, 145:, 0])
    with open(tmp_path / "folder" / "labels.csv", encoding="utf-8") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == ["a one", "a two"]


def test_the_null_is_in_the_weights_and_evaluations_ask_held_out_captions(run, pairs):
    from dtrain.data.shards.manifest import load
    from dtrain.evaluation.evaluate import asked_of
    from dtrain.evaluation.reference import Reference

    model = dtrain.load(run.run.path)
    assert model.model.conditions["text"].null.shape == (1, 32)
    reference = Reference.open(run, torch.device("cpu"))
    manifest = load(pairs / "holdout" / "manifest.json")
    assert manifest.samples == len(reference.captions["text"]) == 48
    assert all(one.startswith("the digit ") for one in reference.captions["text"])
    assert asked_of([1, 49], reference) == {"text": [reference.captions["text"][1]] * 2}


def test_a_frozen_encoder_is_in_no_checkpoint_and_no_other_takes_its_place(pairs, tmp_path):
    pytest.importorskip("transformers")
    from dtrain.checkpoint.export import open_checkpoint
    from dtrain.conditions import requirements
    from dtrain.errors import UserError
    from dtrain.run import RunDirectory
    from tests.conditions.encoder_folders import written

    folder, other = (written("bert", tmp_path / name, seed) for seed, name in enumerate(("encoder", "other")))
    of_folder = f"conditions.text.encoder={folder}", "conditions.text.width=null", "train.steps=2", "eval.every=2"
    config = words(pairs, tmp_path, *of_folder, "eval.num_samples=12")
    run_ranks(train, 2, config)
    assert np.isfinite(losses(config)).all()
    checkpoint = open_checkpoint(RunDirectory(config.run.path))
    names = {name.split(":")[0] for name in checkpoint.tensors if name.startswith("conditions.")}
    assert names == {
        f"conditions.text.{n}"
        for n in ("null", *(f"words.{m}.{p}" for m in ("proj", "norm") for p in ("weight", "bias")))
    }
    line = next(line for line in read(config.run.path / "journal.jsonl") if line["event"] == "eval")
    assert line["context"]["text_encoders"] == checkpoint.meta["text_encoders"]
    assert len(dtrain.load(config.run.path).sample(prompts="a one", steps=1)) == 1
    for path in other.iterdir():
        path.replace(folder / path.name)
    requirements.fingerprint.cache_clear()
    with pytest.raises(UserError, match="trained with another text encoder"):
        dtrain.load(config.run.path)
