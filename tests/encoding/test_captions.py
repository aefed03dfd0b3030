"""`dtrain encode --text`: what transformers says of each caption, ragged, the same bytes however it ran."""

import json
import os
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load as tensors_of

from dtrain.data.shards.manifest import load
from dtrain.errors import UserError
from tests.command_line import command, failing
from tests.conditions.encoder_folders import WIDTH, written
from tests.data.shard_files import samples_of
from tests.encoding.caches import COUNT, LENGTH, captioned, captions, encode, encoded, killed, killed_after
from tests.first_stage.caches import content
from tests.first_stage.folders import save_kl
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return written("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return captioned(tmp_path_factory.mktemp("captioned") / "train")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, shards, bert):
    """Of one rank, in float32."""
    folder = tmp_path_factory.mktemp("cache") / "words"
    encoded(shards, folder, bert, dtype="float32")
    return folder


def words_of(folder, member="text.safetensors"):
    return [tensors_of(sample[member]) for sample in samples_of(folder)]


@torch.no_grad()
def test_it_holds_what_transformers_says_of_each_caption_as_long_as_it_is(shards, cache, bert):
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(bert), transformers.BertModel.from_pretrained(bert)
    total = cut = 0
    for number, (found, sample) in enumerate(zip(words_of(cache), samples_of(cache), strict=True)):
        said = [one for one in captions(number) if one]
        assert found["counts"].shape == (max(1, len(said)), 2)
        at = 0
        for words, (kept, whole) in zip(said, found["counts"].tolist(), strict=False):
            alone = tokenizer(words, truncation=True, max_length=LENGTH, return_tensors="pt")
            expected = model.eval()(**{k: alone[k] for k in ("input_ids", "attention_mask")}).last_hidden_state[0]
            assert (kept, whole) == (len(expected), len(tokenizer(words)["input_ids"]))
            assert (found["tokens"][at : at + kept] - expected).abs().max() < 1e-5
            at, total, cut = at + kept, total + 1, cut + (whole > LENGTH)
        assert found["tokens"].shape == (at, WIDTH)
        assert said or found["counts"].tolist() == [[0, 0]]
        assert json.loads(sample["json"]) == {"en": captions(number)}
    (made,) = load(cache / "manifest.json").embeddings
    wordless = sum(not any(captions(n)) for n in range(COUNT))
    assert (made.captions, made.truncated, made.wordless) == (total, cut, wordless)
    assert min(total, cut, wordless) > 0
    assert made.source == load(shards / "manifest.json").hash != load(cache / "manifest.json").hash


def test_the_bytes_are_the_same_on_1_2_and_3_ranks_and_after_kills(tmp_path, shards, cache, bert):
    encoded(shards, tmp_path / "on-3", bert, 3, dtype="float32")
    for ranks, kill_at in ((2, 14), (1, 30)):  # in shards of 7
        killed(shards, tmp_path / "killed", bert, ranks, kill_at, dtype="float32")
    encoded(shards, tmp_path / "killed", bert, 2, dtype="float32")
    assert content(tmp_path / "on-3") == content(tmp_path / "killed") == content(cache)
    assert "keeping what is there" in encoded(shards, tmp_path / "killed", bert, 2, dtype="float32")
    for ranks in (1, 3):  # blocks begin with each shard
        encoded(shards, tmp_path / f"blocks-{ranks}", bert, ranks, dtype="float32", block=4)
    assert content(tmp_path / "blocks-1") == content(tmp_path / "blocks-3")
    for own, other in zip(words_of(cache), words_of(tmp_path / "blocks-1"), strict=True):
        assert torch.allclose(own["tokens"], other["tokens"], atol=1e-5)


KINDS = {"float16": {}, "float32": {"dtype": "float32"}, "blocks": {"block": 5}, "bf16": {"precision": "bf16"}}


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_four_kills_at_any_moment_leave_the_same_bytes(tmp_path, bert, kind):
    """Three times of each kind, on 1 to 3 ranks, which change with each call, at moments of a seed that is printed."""
    seed = int(os.environ.get("DTRAIN_SEED", time.time_ns() % 2**32))
    print(f"DTRAIN_SEED={seed}")
    draws, request = np.random.default_rng(seed), KINDS[kind]
    shards = captioned(tmp_path / "train", 300)
    started = time.monotonic()
    encoded(shards, tmp_path / "whole", bert, 2, **request)
    longest = time.monotonic() - started
    for number in range(3):
        kills = 0
        while kills < 4:
            ranks, moment = int(draws.integers(1, 4)), draws.uniform(0, longest)
            kills += killed_after(moment, shards, tmp_path / f"{number}", bert, ranks, **request)
        encoded(shards, tmp_path / f"{number}", bert, int(draws.integers(1, 4)), **request)
        assert content(tmp_path / f"{number}") == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "train", "whole"]


def test_halves_are_the_nearest(tmp_path, shards, cache, bert):
    for dtype in ("float16", "bfloat16"):
        encoded(shards, tmp_path / dtype, bert, dtype=dtype)
        for half, whole in zip(words_of(tmp_path / dtype), words_of(cache), strict=True):
            assert torch.equal(half["tokens"], whole["tokens"].to(getattr(torch, dtype)))
            assert torch.equal(half["counts"], whole["counts"])


def test_beside_latents_and_a_second_encoder_beside_the_first(tmp_path, shards, cache, bert, autoencoder):
    run_ranks(encode, 2, shards, tmp_path / "both", bert, {"dtype": "float32"}, None, autoencoder)
    found, samples = load(tmp_path / "both" / "manifest.json"), samples_of(tmp_path / "both")
    assert found.fields == ["cls", "json", "moments.npy", "text.safetensors", "txt"]
    assert found.latents.mirrors == 2
    assert [s["text.safetensors"] for s in samples] == [s["text.safetensors"] for s in samples_of(cache)]
    t5 = written("t5", tmp_path / "t5")
    encoded(tmp_path / "both", tmp_path / "two", t5, name="long", field="txt")
    two = load(tmp_path / "two" / "manifest.json")
    assert [one.name for one in two.embeddings] == ["text", "long"]
    assert two.latents == found.latents
    assert [s["moments.npy"] for s in samples_of(tmp_path / "two")] == [s["moments.npy"] for s in samples]
    assert len(words_of(tmp_path / "two", "long.safetensors")) == COUNT


def test_on_the_command_line_with_the_bytes_it_takes_before_they_are_written(tmp_path, shards, cache, bert):
    words = ("--text", bert, "--caption", "json:en", "--length", LENGTH)
    ((code, said),) = run_ranks(command, 1, "encode", shards, tmp_path / "words", *words, "--dtype", "float32")
    assert code == 0, said
    assert content(tmp_path / "words") == content(cache)
    first, last = said.splitlines()[0], said.splitlines()[-1]
    assert "of at most 8 tokens a caption, 1.02 kB)" in first
    foretold, took = first.split("about ")[1].split(" kB")[0], sum(p.stat().st_size for p in cache.glob("*.tar"))
    assert float(foretold) * 1e3 == pytest.approx(took, rel=0.25)
    assert "captions of json:en are cached for conditions.text" in last
    ((code, said),) = run_ranks(command, 1, "verify", tmp_path / "words")
    assert (code, "0 of 6 shards damaged" in said) == (0, True)


def test_what_cannot_be_encoded_is_one_line(tmp_path, shards, cache, bert):
    from dtrain.encoding.captions import CaptionRequest
    from dtrain.encoding.encode import Request
    from dtrain.encoding.encode import encode as run
    from dtrain.encoding.pictures import PictureRequest

    other = written("bert", tmp_path / "other", seed=1)
    vae = save_kl(tmp_path / "vae")
    new, there = tmp_path / "new", {"field": "json:en", "length": LENGTH, "dtype": "float32"}
    latents = PictureRequest(str(vae), 8, dtype="bfloat16")
    for source, destination, request, said in (
        (shards, new, Request(), "say what is encoded: --first-stage FOLDER for latents, --text FOLDER"),
        (shards, new, words(tmp_path / "nowhere"), "copy a folder that transformers has saved"),
        (shards, new, words(bert, dtype="int8"), "--dtype int8 is none of float16, bfloat16"),
        (shards, new, words(bert, field="html"), "--caption: String should match pattern"),
        (shards, new, words(bert, field="x.json:en"), "and no x.json with captions"),
        (shards, new, words(bert, name="a b"), "'a b' is no name of a condition"),
        (shards, new, Request(None, CaptionRequest(str(bert)), True), "--statistics-only is of latents"),
        (shards, new, Request(latents, CaptionRequest(str(bert))), "latents are kept in"),
        (cache, new, words(bert), "has text.safetensors already; name the other condition with --name"),
        (shards, cache, words(other, **there), "was made with text.encoder"),
        (shards, cache, words(bert, **there | {"length": 9}), "was made with text.length 8, not 9"),
    ):
        with pytest.raises(UserError) as e:
            run(str(source), str(destination), request)
        assert said in str(e.value)
        assert "\n" not in str(e.value)
    assert "--dtype int8 is none of" in failing("encode", shards, new, "--text", bert, "--dtype", "int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "vae"]


def words(folder, **request):
    from dtrain.encoding.captions import CaptionRequest
    from dtrain.encoding.encode import Request

    return Request(None, CaptionRequest(str(folder), **request))
