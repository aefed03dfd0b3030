"""Training on cached words: the losses of encoding in each step, bit for bit, and no cache but the right one."""

import contextlib
import itertools
import os

import numpy as np
import pytest
import torch

from dtrain.conditions.build import build
from dtrain.data.shards.manifest import load_all
from dtrain.data.stream import Completion, StepDataset
from dtrain.errors import UserError
from dtrain.tracking.journal import read
from dtrain.training.check import check_start
from tests.conditions.encoder_folders import WIDTH, written
from tests.digits import tiny
from tests.encoding.caches import LENGTH, captioned, encoded
from tests.training.runs import trained

pytest.importorskip("transformers")

WORDS = ("data.streams=1", "model.num_classes=0", "train.steps=8", "data.holdout=null", "data.flip=true")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with captioned pictures in train/, encoders in bert/ and other/, and caches of their words."""
    folder = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("bert", "other")):
        written("bert", folder / name, seed)
    captioned(folder / "train")
    for dtype in ("float32", "float16", "bfloat16"):
        encoded(folder / "train", folder / dtype, folder / "bert", 2, dtype=dtype)
    return folder


def config_of(place, folder, shards, *overrides, **text):
    keys = {"encoder": place / "bert", "field": "json:en", "length": LENGTH, "dropout": 0.3} | text
    own = (f"conditions.text.{key}={value}" for key, value in keys.items())
    return tiny(place, folder, f"data.shards={place / shards}", *WORDS, *own, *overrides)


@pytest.mark.parametrize(("stage", "ranks", "null"), [(0, 1, "empty"), (2, 2, "learned")])
def test_cached_and_online_training_have_the_same_losses_bit_for_bit(tmp_path, place, stage, ranks, null):
    same_losses(tmp_path, place, stage, ranks, null, steps=8)


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("stage", "ranks", "null"), itertools.product((0, 1, 2, 3), (1, 2), ("empty", "learned", "zeros"))
)
def test_cached_and_online_training_have_the_same_losses_over_50_steps(tmp_path, place, stage, ranks, null):
    same_losses(tmp_path, place, stage, ranks, null, steps=50)


@pytest.mark.campaign
@pytest.mark.skipif("DTRAIN_TEXT_ENCODER" not in os.environ, reason="DTRAIN_TEXT_ENCODER names no encoder's folder")
def test_with_a_published_encoder_too(tmp_path, place):
    folder = os.environ["DTRAIN_TEXT_ENCODER"]
    encoded(place / "train", tmp_path / "float32", folder, 2, dtype="float32", length=24)
    how = {"encoder": folder, "length": 24}
    online = config_of(place, tmp_path / "online", "train", "train.steps=20", **how)
    cached = config_of(tmp_path, tmp_path / "cached", "float32", "train.steps=20", **how, cached="float32")
    assert trained(online, 2) == trained(cached, 2)


def same_losses(tmp_path, place, stage, ranks, null, steps):
    how = (f"deepspeed.zero_stage={stage}", f"run.name={null}", f"train.steps={steps}")
    online = config_of(place, tmp_path / "online", "train", *how, null=null)
    cached = config_of(place, tmp_path / "cached", "float32", *how, null=null, cached="float32")
    losses = trained(online, ranks)
    assert len(losses) == steps
    assert losses == trained(cached, ranks)
    counts = [
        [
            line["metrics"]["captions_truncated"]
            for line in read(c.run.path / "journal.jsonl")
            if line["event"] == "train"
        ]
        for c in (online, cached)
    ]
    assert counts[0] == counts[1]
    assert sum(counts[0]) > 0


def test_several_captions_are_drawn_alike_and_halves_are_near(tmp_path, place):
    told = {}
    for shards, cached in (("train", "null"), ("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16")):
        config = config_of(place, tmp_path, shards, cached=cached)
        dataset = StepDataset(config, load_all(config.data), 0, 1, 0)
        told[shards] = build(config).of_batch(Completion(config)(dataset[0]))
    for shards, tolerance in (("float32", 0.0), ("float16", 2e-3), ("bfloat16", 2e-2)):
        assert told[shards]["text"].dtype == torch.float32
        assert torch.equal(told[shards]["text_mask"], told["train"]["text_mask"])
        there = told["train"]["text_mask"][..., None]
        difference = (told[shards]["text"] - told["train"]["text"] * there).abs().max()
        assert (difference == 0) if tolerance == 0 else (0 < difference < tolerance * 4)


def test_the_bytes_on_their_way_to_the_device_are_those_of_the_cache(tmp_path, place):
    from dtrain.data.declared import declared

    config = config_of(place, tmp_path, "float16", cached="float16")
    dataset = StepDataset(config, load_all(config.data), 0, 1, 0)
    batch = dataset[0]
    assert batch["text"].dtype == torch.float16
    sizes = {field.name: field.row_bytes for field in declared(config).fields}
    assert sizes["text"] == LENGTH * WIDTH * 2 == batch["text"][0].nbytes
    assert sizes["text_tokens"] == batch["text_tokens"][0].nbytes


REFUSED = {
    "pictures": ("train", {}, "has no cached words of this name; make them with: dtrain encode"),
    "another dtype": ("float16", {}, "dtype float16, and conditions.text.cached has float32"),
    "another length": ("float32", {"length": 9}, "length 8, and conditions.text.length has 9"),
    "another field": ("float32", {"field": "txt"}, "captions of json:en, and conditions.text.field has txt"),
    "another precision": ("float32", {"precision": "bf16"}, "precision fp32, and conditions.text.precision has bf16"),
    "another block": ("float32", {"block": 2}, "blocks of 1, and conditions.text.block has 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_other_cache_begins_a_training(tmp_path, place, name):
    shards, text, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as e:
        check_start(config_of(place, tmp_path, shards, **({"cached": "float32"} | text)), 1)
    assert "\n" not in str(e.value)


def test_another_encoder_is_refused_and_the_right_cache_says_what_is_in_it(tmp_path, place):
    with pytest.raises(UserError, match=r"made with an encoder of fingerprint \w{12}, and conditions.text.encoder has"):
        check_start(config_of(place, tmp_path, "float32", cached="float32", encoder=place / "other"), 1)
    said = check_start(config_of(place, tmp_path, "float32", cached="float32"), 1)
    assert "captions of json:en are cached for conditions.text" in said
    assert "longer than 8, cut" in said


def test_a_run_on_a_cache_is_asked_by_prompts_and_knows_its_encoder(tmp_path, place):
    import dtrain
    from dtrain.checkpoint.export import open_checkpoint
    from dtrain.run import RunDirectory

    online = config_of(place, tmp_path / "online", "train", "train.steps=2")
    cached = config_of(place, tmp_path / "cached", "float32", "train.steps=2", cached="float32")
    for config in (online, cached):
        trained(config, 1)
    drawn = [dtrain.load(c.run.path).sample(prompts=["a nine", "two"], steps=2) for c in (online, cached)]
    assert np.array_equal(*drawn)
    stated = [open_checkpoint(RunDirectory(c.run.path)).meta["text_encoders"] for c in (online, cached)]
    assert stated[0] == stated[1] == build(online).fingerprints


def test_a_damaged_member_is_a_bad_sample_and_nothing_worse():
    from safetensors.torch import save

    from dtrain.data.fields.embedded import Content
    from dtrain.errors import BadSample

    counts = torch.tensor([[2, 2], [3, 9]], dtype=torch.int32)
    whole = save({"tokens": torch.ones(5, 4), "counts": counts})
    found = Content.of(whole, "float32", 3, 4)
    assert (found.tokens.shape, found.counts.tolist()) == ((5, 4), counts.tolist())
    for data, words in (
        (whole[:60], "is no file of safetensors"),
        (whole[:-1], "lies outside of it"),
        (b"\xff" * 100, "no header"),
        (save({"tokens": torch.ones(5, 4)}), "no file of safetensors with counts"),
        (save({"tokens": torch.ones(5, 4).half(), "counts": counts}), "it is F16, not F32"),
        (save({"tokens": torch.ones(5, 8), "counts": counts}), "not of 4"),
        (save({"tokens": torch.ones(4, 4), "counts": counts}), "counts other tokens than it holds"),
        (
            save({"tokens": torch.ones(5, 4), "counts": counts.flip(0) + torch.tensor([[1, 0]], dtype=torch.int32)}),
            "other tokens",
        ),
    ):
        with pytest.raises(BadSample, match=words):
            Content.of(data, "float32", 3, 4)
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[int(generator.integers(len(data)))] ^= 1 << int(generator.integers(8))
        with contextlib.suppress(BadSample):
            Content.of(bytes(data), "float32", 3, 4)
