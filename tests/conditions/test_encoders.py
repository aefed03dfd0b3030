"""Frozen text encoders from local folders: what transformers itself says, the same in any company, from no network."""

import socket
import sys

import pytest
import torch

from dtrain.conditions.build import build
from dtrain.config import load
from dtrain.config.encoders import check
from dtrain.errors import UserError
from tests.conditions.encoder_folders import KINDS, WIDTH, written
from tests.digits import CONFIG

transformers = pytest.importorskip("transformers")

LENGTH = 8
SAID = ["the digit three left of the digit seven", "a nine", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("encoders")
    return {kind: written(kind, place / kind) for kind in KINDS}


def config(folder, *overrides):
    own = (f"conditions.text.encoder={folder}", f"conditions.text.length={LENGTH}", "model.num_classes=0")
    return load(CONFIG, ["data.shards=d", "data.holdout=null", "eval.every=0", *own, *overrides])


def told(config, words):
    return build(config).of_ids(list(range(len(words))), torch.zeros(len(words)), {"text": words})


@pytest.fixture
def no_network(monkeypatch):
    def refused(*_):
        raise OSError("a test without a network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_told_as_transformers_encodes_it(folders, kind, no_network):
    found = told(config(folders[kind]), SAID[:2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    classes = {"clip": transformers.CLIPTextModel, "t5": transformers.T5EncoderModel}
    model = classes.get(kind, transformers.AutoModel).from_pretrained(folders[kind]).eval()
    assert found["text"].shape == (2, LENGTH, WIDTH)
    for row, words in enumerate(SAID[:2]):
        alone = tokenizer(words, truncation=True, max_length=LENGTH, return_tensors="pt")
        count = alone["input_ids"].shape[1]
        assert found["text_mask"][row].tolist() == [True] * count + [False] * (LENGTH - count)
        with torch.no_grad():
            expected = model(input_ids=alone["input_ids"], attention_mask=alone["attention_mask"]).last_hidden_state
        assert (found["text"][row, :count] - expected[0]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_told_alike_in_any_company(folders, kind):
    many = told(config(folders[kind]), [*SAID[:2], "two", "a three", SAID[0]])
    for row, words in enumerate([*SAID[:2], "two", "a three", SAID[0]]):
        alone = told(config(folders[kind]), [words])
        assert all(torch.equal(alone[name][0], many[name][row]) for name in alone)
    blocks = told(config(folders[kind], "conditions.text.block=4"), [*SAID[:2], "two", "a three", SAID[0]])
    assert torch.allclose(blocks["text"], many["text"], atol=1e-5)


def test_the_null_of_an_empty_caption_is_what_the_encoder_says_of_it(folders):
    conditions = build(config(folders["bert"], "conditions.text.null=empty"))
    nothing = conditions.null(told(config(folders["bert"]), ["a nine"]))
    model = transformers.BertModel.from_pretrained(folders["bert"]).eval()
    with torch.no_grad():
        expected = model(torch.tensor([[2, 3]])).last_hidden_state[0]
    assert nothing["text_mask"][0].tolist() == [True] * 2 + [False] * 6
    assert (nothing["text"][0, :2] - expected).abs().max() < 1e-5
    wordless = conditions.of_ids([0], torch.zeros(1), {"text": [" "]})
    assert all(torch.equal(wordless[name], nothing[name]) for name in wordless)


def test_an_encoder_is_told_by_its_files_and_by_how_it_is_computed(folders, tmp_path):
    one, other = config(folders["bert"]), config(written("bert", tmp_path / "other", seed=1))
    prints = [build(c).fingerprints["text"] for c in (one, other, config(folders["bert"], "conditions.text.block=2"))]
    assert len(set(prints)) == 3
    build(one).check({"text": prints[0]})
    with pytest.raises(UserError, match=r"another text encoder .* name the right folder in conditions.text.encoder"):
        build(one).check({"text": prints[1]})


def test_what_is_missing_is_one_line_that_says_what_to_copy_where(folders, tmp_path):
    with pytest.raises(UserError, match=r"no .*/nowhere/config.json, .*copy a folder that transformers has saved"):
        config(tmp_path / "nowhere")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folders["bert"] / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"bare has no tokenizer; copy tokenizer.json and tokenizer_config.json there"):
        told(config(bare), ["a"])
    with pytest.raises(UserError, match=r"bare has no model.safetensors; copy it there"):
        check("conditions.text.width", 32, bare)
    with pytest.raises(UserError, match=r"conditions.text.width is 16, and .* has 32"):
        check("conditions.text.width", 16, folders["bert"])


def test_without_transformers_a_folder_is_refused_in_one_line(folders, monkeypatch):
    from dtrain.conditions import encoders
    from dtrain.data.fields import tokens

    for cached in (encoders._read, tokens._read, tokens._closing):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs the package transformers.*: pip install 'dtrain\[text\]', or take"):
        told(config(folders["bert"]), ["a"])
