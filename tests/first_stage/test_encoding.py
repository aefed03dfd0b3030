"""`dtrain encode`: the same bytes however it ran, the moments that diffusers computes, and exact statistics."""

import io
import json
import os
import time

import numpy as np
import pytest
import torch

from dtrain.data.fields.picture import decode, normalize
from dtrain.data.shards.manifest import load
from dtrain.first_stage.requirements import read_statistics
from tests.command_line import command, failing
from tests.data.shard_files import data_set, labelled_pictures, samples_of
from tests.first_stage.caches import COUNT, content, encoded, killed, killed_after, pictures
from tests.first_stage.folders import save_kl
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures") / "train")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, shards, autoencoder):
    """Of one rank, with mirrors."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    encoded(shards, folder, autoencoder, mirrors=True)
    return folder


def moments_of(folder):
    """(N, mirrors, 2, C, h, w)."""
    return np.stack([np.load(io.BytesIO(sample["moments.npy"])) for sample in samples_of(folder)])


def test_a_cache_has_the_same_bytes_on_1_2_and_3_ranks(tmp_path, shards, cache, autoencoder):
    for ranks in (2, 3):
        encoded(shards, tmp_path / f"on-{ranks}", autoencoder, ranks, mirrors=True)
        assert content(tmp_path / f"on-{ranks}") == content(cache)
    assert sorted(content(cache)) == [
        *("encode.json", *(f"latents-{n:06d}.tar" for n in range(7)), "manifest.json", "manifest.members")
    ]


def test_a_cache_that_was_killed_four_times_has_the_same_bytes(tmp_path, shards, cache, autoencoder):
    folder = tmp_path / "latents"
    for kill_at in (5, 15, 30, 60):  # of the rank's own pictures, in shards of 12; the last time there is one rank
        killed(shards, folder, autoencoder, 2 if kill_at < 36 else 1, kill_at, mirrors=True)
        assert not folder.exists()
    said = encoded(shards, folder, autoencoder, 2, mirrors=True)
    assert f"latents of {COUNT} pictures, [4, 4, 4] each" in said
    assert content(folder) == content(cache)
    assert [p.name for p in tmp_path.iterdir()] == ["latents"]
    assert "keeping what is there" in encoded(shards, folder, autoencoder, 2, mirrors=True)


KINDS = {
    "float32": {},
    "float16 with mirrors": {"dtype": "float16", "mirrors": True},
    "blocks": {"block": 5, "mirrors": True},
    "statistics": {"statistics_only": True, "mirrors": True},
}


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_four_kills_at_any_moment_leave_the_same_bytes(tmp_path, autoencoder, kind):
    """Five times of each kind, on 1 to 3 ranks, which change with each call, at moments of a seed that is printed."""
    seed = int(os.environ.get("DTRAIN_SEED", time.time_ns() % 2**32))
    print(f"DTRAIN_SEED={seed}")
    draws, request = np.random.default_rng(seed), {"statistics_only": False} | KINDS[kind]
    shards = pictures(tmp_path / "train", 600)
    started = time.monotonic()
    encoded(shards, tmp_path / "whole", autoencoder, 2, **request)
    longest = time.monotonic() - started
    for number in range(5):
        kills = 0
        while kills < 4:
            ranks, moment = int(draws.integers(1, 4)), draws.uniform(0, longest)
            kills += killed_after(moment, shards, tmp_path / f"{number}", autoencoder, ranks, **request)
        encoded(shards, tmp_path / f"{number}", autoencoder, int(draws.integers(1, 4)), **request)
        assert bytes_of(tmp_path / f"{number}") == bytes_of(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [*"01234", "train", "whole"]


def bytes_of(made):
    return content(made) if made.is_dir() else made.read_bytes()


@torch.no_grad()
def test_it_holds_diffusers_moments_of_each_picture_and_its_mirror_and_the_files_beside(shards, cache, autoencoder):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae, found = AutoencoderKL.from_pretrained(autoencoder), moments_of(cache)
    assert (found.dtype, found.shape) == (np.float32, (COUNT, 2, 2, 4, 4, 4))
    for number, (sample, source) in enumerate(zip(samples_of(cache), samples_of(shards), strict=True)):
        assert {f: sample[f] for f in ("cls", "txt", "json")} == {f: source[f] for f in ("cls", "txt", "json")}
        picture = normalize(decode(source["png"], 1))[None]
        for mirror, look in enumerate((picture, picture.flip(-1))):
            posterior = vae.encode(look).latent_dist
            expected = torch.cat([posterior.mean, posterior.std]).numpy()
            np.testing.assert_allclose(found[number, mirror], expected, atol=1e-5, rtol=1e-5)


def test_its_statistics_are_those_of_all_samples_of_all_posteriors(tmp_path, shards, cache, autoencoder):
    mean, std = np.moveaxis(moments_of(cache).astype(np.float64), 2, 0)  # (N, mirrors, C, h, w)
    centre = mean.mean((0, 1, 3, 4))
    deviation = np.sqrt(mean.var((0, 1, 3, 4)) + np.square(std).mean((0, 1, 3, 4)))
    made = load(cache / "manifest.json").latents
    np.testing.assert_allclose(made.mean, centre, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(made.deviation, deviation, rtol=1e-12)
    for ranks in (1, 2, 3):  # without a cache: to the last bit
        path = tmp_path / f"statistics-{ranks}.json"
        encoded(shards, path, autoencoder, ranks, statistics_only=True, mirrors=True)
        assert read_statistics(path) == made
    assert len(list(tmp_path.iterdir())) == 3


def test_float16_is_the_nearest_and_its_statistics_are_of_what_was_encoded(tmp_path, shards, cache, autoencoder):
    encoded(shards, tmp_path / "half", autoencoder, mirrors=True, dtype="float16")
    half, made = moments_of(tmp_path / "half"), load(tmp_path / "half/manifest.json").latents
    assert np.array_equal(half, moments_of(cache).astype(np.float16))
    assert made.mean == load(cache / "manifest.json").latents.mean


def test_blocks_begin_with_each_shard_and_differ_by_rounding_alone(tmp_path, shards, cache, autoencoder):
    for ranks in (1, 3):
        encoded(shards, tmp_path / f"blocks-{ranks}", autoencoder, ranks, mirrors=True, block=5)
    assert content(tmp_path / "blocks-1") == content(tmp_path / "blocks-3")
    np.testing.assert_allclose(moments_of(tmp_path / "blocks-1"), moments_of(cache), atol=1e-5, rtol=1e-5)


def test_on_the_command_line(tmp_path, shards, cache, autoencoder):
    words = ("encode", shards, tmp_path / "latents", "--first-stage", autoencoder, "--size", 8, "--mirrors")
    results = run_ranks(command, 2, *words)
    assert [code for code, _ in results] == [0, 0]
    assert f"latents: latents of {COUNT} pictures" in results[0][1]
    assert results[1][1] == ""
    assert content(tmp_path / "latents") == content(cache)
    assert json.loads((tmp_path / "latents/encode.json").read_text())["mirrors"] == 2
    assert "looked at" not in results[0][1]  # all are of this size

    words = ("encode", shards, tmp_path / "statistics.json", "--first-stage", autoencoder, "--statistics-only")
    ((_, said),) = run_ranks(command, 1, *words, "--size", 12)
    assert "of 64 images looked at, all are enlarged to 12 (shorter sides 8 pixels)" in said


def test_what_cannot_be_encoded_is_one_line(tmp_path, shards, cache, autoencoder):
    (tmp_path / "file").write_text("x")
    other = save_kl(tmp_path / "other", seed=1)
    for destination, source, more, words in (
        ("s3://bucket/latents", autoencoder, (), "is no local folder; encode into one, copy it there"),
        (tmp_path / "new", autoencoder, ("--size", 9), "--size 9 does not divide by 2"),
        (tmp_path / "new", autoencoder, ("--dtype", "bfloat16"), "--dtype bfloat16 is neither"),
        (tmp_path / "new", autoencoder, ("--precision", "fp16"), "autoencoders overflow in fp16"),
        (tmp_path / "new", tmp_path, (), "config.json, which describes an autoencoder"),
        (tmp_path / "file", autoencoder, (), "exists and was not made by `dtrain encode`"),
        (cache, other, ("--mirrors",), "was made with weights"),
        (cache, autoencoder, (), "was made with mirrors 2, not 1"),
        (cache, autoencoder, ("--mirrors", "--size", 16), "was made with size 8, not 16"),
    ):
        words_of = ("encode", shards, destination, "--first-stage", source, "--size", 8, *more)
        assert words in failing(*words_of, world_size=2)
    assert "none of them a picture" in failing("encode", cache, tmp_path / "new", "--first-stage", autoencoder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]


def test_a_picture_that_cannot_be_read_ends_all_ranks_and_is_named(tmp_path, autoencoder):
    samples = labelled_pictures(20, channels=1)
    samples[13]["png"] = b"broken"
    data_set(tmp_path / "train", samples)
    words = ("encode", tmp_path / "train", tmp_path / "new", "--first-stage", autoencoder, "--size", 8)
    results = run_ranks(command, 2, *words)
    assert 2 in [code for code, _ in results]
    (before, said) = [line for _, text in results for line in text.splitlines()]
    assert "about 48.6 kB: 28.2 kB of latents, 20.5 kB of other files" in before
    assert "000013.png is not a JPEG" in said
    assert not (tmp_path / "new").exists()
