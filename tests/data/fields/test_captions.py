"""Captions of samples: where they are, which of several, what stands for none, what a check says of them."""

import json

import numpy as np
import pytest
from scipy import stats

from dtrain.config import load
from dtrain.config.conditions import BEGIN
from dtrain.data.fields.caption import PADDING, Caption, Words
from dtrain.data.fields.captions import look
from dtrain.data.fields.samples import read_captions
from dtrain.data.fields.tokens import Bytes
from dtrain.data.stream import StepDataset
from dtrain.errors import BadSample, UserError
from dtrain.randomness import Draws, Purpose
from dtrain.training.check import check_start
from tests.data.shard_files import data_set, picture
from tests.digits import CONFIG


def as_json(tree):
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    ("place", "data", "words"),
    [
        ("txt", b"a red  cat\n", "a red cat"),
        ("txt", "\ufeffein Bär".encode(), "ein Bär"),
        ("txt", b" \n", ""),
        ("json:caption", as_json({"caption": "a dog"}), "a dog"),
        ("json:text.en", as_json({"text": {"en": "a dog", "de": "ein Hund"}}), "a dog"),
        ("json:caption", as_json({"caption": None}), ""),
        ("json:caption", as_json({"caption": "  "}), ""),
        ("json:caption", as_json({"caption": []}), ""),
        ("json:caption", as_json({"caption": [None, "a dog", " "]}), "a dog"),
        ("info.json:caption", as_json({"caption": "a dog"}), "a dog"),
    ],
)
def test_a_caption_is_found_where_its_place_says(place, data, words):
    assert Words.at(place).of(data) == words


@pytest.mark.parametrize(
    ("place", "data", "problem"),
    [
        ("txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("json:caption", b"{", "no JSON that can be read"),
        ("json:caption", as_json({"text": "a"}), "has no caption; write null there"),
        ("json:a.b", as_json({"a": "b"}), "has no a.b"),
        ("json:caption", as_json({"caption": 3}), "no text, null, or list of these"),
        ("json:caption", as_json({"caption": ["a", 3]}), "no text, null, or list of these"),
        ("json:caption", as_json([1]), "has no caption"),
        ("json:caption", b"[" * 100_000, "no JSON that can be read"),
    ],
)
def test_what_is_no_caption_is_a_bad_sample(place, data, problem):
    with pytest.raises(BadSample, match=problem):
        Words.at(place).of(data)


def test_a_row_holds_how_many_tokens_there_are_and_the_first_of_them():
    field = Caption("text", "txt", 4, Bytes())
    assert field.row("ab").tolist() == [3, BEGIN, 97, 98, PADDING]
    assert field.row("abcdef").tolist() == [7, BEGIN, 97, 98, 99]
    assert field.row(" ").tolist() == [0, *[PADDING] * 4]
    assert field.empty().tolist() == [1, BEGIN, PADDING, PADDING, PADDING]
    rows = field.collate([field.row(words) for words in ("", "ab", "abc", "abcd", "ä")])
    assert field.truncated(rows) == 1


def test_a_caption_that_is_cut_keeps_the_tokens_that_end_it():
    class Sentence:
        closing = 1

        def __call__(self, words):
            return [101, *range(len(words.split())), 102]

    row = Caption("text", "txt", 4, Sentence()).row("a b c d e f")
    assert row.tolist() == [8, 101, 0, 1, 102]


def captioned(folder, captions):
    samples = [{"png": picture(i, channels=1), "json": as_json({"caption": one})} for i, one in enumerate(captions)]
    return data_set(folder, samples)


def of_words(folder, **more):
    changes = [f"data.{key}={value}" for key, value in more.items()]
    return load(
        CONFIG,
        [
            *(f"data.shards={folder}", "data.holdout=null", "data.batch_size=100", "data.workers=0", "eval.every=0"),
            *("model.num_classes=0", "conditions.text.field=json:caption", "conditions.text.length=8"),
            "data.streams=1",
            *changes,
        ],
    )


def test_which_of_several_captions_an_image_is_told_is_drawn_by_its_key(tmp_path):
    """Each alike often, and with k known: the same whatever the world size, another in another epoch."""
    manifest = captioned(tmp_path, [["a", "b", "c"]] * 30)
    dataset = StepDataset(of_words(tmp_path), manifest, 0, 1, 0)
    halves = [StepDataset(of_words(tmp_path), manifest, rank, 2, 0) for rank in range(2)]
    draws, seen = Draws(0), []
    for step in range(6):
        batch = dataset[step]
        told = dict(zip(batch["k"].tolist(), (chr(c) for c in batch["text"][:, 2]), strict=True))
        assert told == {k: "abc"[int(3 * draws.uniform(Purpose.CAPTION, k))] for k in told}
        for half in halves:
            part = half[step]
            assert {k: told[k] for k in part["k"].tolist()} == dict(
                zip(part["k"].tolist(), (chr(c) for c in part["text"][:, 2]), strict=True)
            )
        seen += told.values()
    assert stats.chisquare([seen.count(c) for c in "abc"]).pvalue > 1e-3


def test_captions_that_are_cut_are_counted_in_the_report(tmp_path):
    manifest = captioned(tmp_path, ["short", "a caption of more than eight bytes"] * 10)
    dataset = StepDataset(of_words(tmp_path), manifest, 0, 1, 0)
    batch = dataset[0]
    assert dataset.take_report().truncated == int((batch["text"][:, 0] > 8).sum()) == 50
    assert dataset.take_report().truncated == 0


def test_a_check_says_how_captions_are_before_a_run_meets_them(tmp_path):
    captioned(tmp_path, ["short", None, "a caption of more than eight bytes"] * 10)
    said = check_start(of_words(tmp_path), 1)
    assert "30 captions of json:caption looked at: 10 without words, told nothing, 10 longer than" in said


def test_a_check_refuses_captions_that_cannot_be_read(tmp_path):
    captioned(tmp_path / "wrong", ["a"] * 29 + [5])
    with pytest.raises(UserError, match=r"no caption at json:caption in 1 of 30 samples looked at; first: sample 29"):
        check_start(of_words(tmp_path / "wrong"), 1)
    data_set(tmp_path / "none", [{"png": picture(i, channels=1)} for i in range(10)])
    with pytest.raises(UserError, match=r"text: .* has no field json"):
        check_start(of_words(tmp_path / "none"), 1)


def test_the_captions_of_a_split_are_the_first_of_each_sample(tmp_path):
    manifest = captioned(tmp_path, [["a", "b"], None, "c"])
    field = Caption("text", "json:caption", 8, Bytes())
    assert read_captions(manifest, tmp_path, field) == ["a", "", "c"]
    assert look(manifest, tmp_path, field, 10).empty == 1


def test_a_batch_without_captions_draws_no_choice(tmp_path):
    manifest = data_set(tmp_path, [{"png": picture(i, channels=1), "cls": b"0"} for i in range(20)])
    config = load(CONFIG, [f"data.shards={tmp_path}", "data.holdout=null", "data.streams=1", "eval.every=0"])
    dataset = StepDataset(config, manifest, 0, 1, 0)
    assert dataset._view_of(7).choice == 0.0
    assert np.array_equal(dataset[0]["k"], np.arange(128))
