"""What is shown and measured of a run in latents: decoded in fixed blocks, by the first stage it was trained with."""

import io
import json
import re
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import dtrain
from dtrain.cluster.plan import plan
from dtrain.data.bench import bench
from dtrain.errors import UserError
from dtrain.evaluation.evaluate import sampling_of
from dtrain.report.neighbours import nearest
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events
from tests.command_line import command, failing
from tests.data.shard_files import samples_of
from tests.digits import tiny
from tests.first_stage.caches import encoded, pictures
from tests.first_stage.folders import latent
from tests.ranks import run_ranks
from tests.training.runs import trained

EVALUATED = ("eval.every=6", "eval.features=pixels", "eval.num_samples=40", "eval.labels=uniform")
EVALUATED += ("eval.validation_images=8", "diffusion.timesteps=40")
ONLINE = ("first_stage.cached=false", "first_stage.block=32")


@pytest.fixture(scope="module")
def place(tmp_path_factory, autoencoder):
    """A folder with train/, holdout/ of 48 pictures, a cache of the first and a copy of the autoencoder."""
    folder = tmp_path_factory.mktemp("place")
    pictures(folder / "train")
    pictures(folder / "holdout", 48, first=300)
    shutil.copytree(autoencoder, folder / "vae")
    encoded(folder / "train", folder / "cache", folder / "vae", mirrors=True)
    return folder


def config_of(place, folder, *overrides):
    data = (f"data.shards={place / 'cache'}", f"data.holdout={place / 'holdout/manifest.json'}", "data.flip=true")
    return latent(place, folder, place / "vae", *data, "first_stage.cached=true", *EVALUATED, *overrides)


@pytest.fixture(scope="module")
def run(place):
    """Two ranks, twelve steps, two evaluations."""
    config = config_of(place, place, "train.steps=12", "eval.metrics=[fd,nats_per_dim_latent]")
    trained(config, 2)
    return config


def lines_of(config, event):
    folder = config.run.path
    paths = (folder / "journal.jsonl", *sorted(folder.glob("journal-eval-*.jsonl")))
    return [line for path in paths for line in events(path) if line["event"] == event]


def autoencoder_of(place):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_pretrained(place / "vae")


def pixels_of(folder):
    """uint8 (N, 1, 8, 8), by Pillow."""
    files = [sample["png"] for sample in samples_of(folder)]
    return torch.from_numpy(np.stack([np.array(Image.open(io.BytesIO(file))) for file in files]))[:, None]


def as_levels(decoded):
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round()


def frechet(a, b):
    """Of pixels in [−1, 1] (N, D): tr √(Σ_a Σ_b) is the nuclear norm of A Bᵀ, where Σ_a is Aᵀ A."""
    a, b = (x.flatten(1).double().numpy() / 127.5 - 1 for x in (a, b))
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    root = np.linalg.norm(centred[0] @ centred[1].T, "nuc")
    spread = sum(np.square(x).sum() for x in centred)
    return np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * root


@torch.no_grad()
def test_the_reconstructions_distance_is_that_of_pictures_through_diffusers_and_is_journaled_once(place, run):
    (line,) = lines_of(run, "floor")
    vae, held_out = autoencoder_of(place), pixels_of(place / "holdout")
    reconstructed = as_levels(vae.decode(vae.encode(held_out[:40] / 127.5 - 1).latent_dist.mean).sample)
    assert line["metrics"] == {"rfd_pixels": pytest.approx(frechet(reconstructed, held_out), rel=1e-3)}
    assert line["context"]["n"] == 40
    assert line["context"]["first_stage"] == lines_of(run, "eval")[0]["context"]["first_stage"]
    assert line["step"] == 1  # as soon as there is something to compare with


@pytest.mark.campaign
def test_it_is_measured_again_by_no_resume_and_no_evaluation_but_one_with_other_settings(tmp_path, place, run):
    config = copied(run, place, tmp_path, "train.steps=13", "eval.metrics=[fd]")
    trained(config, 1)
    evaluate = ("evaluate", config.run.path, "--metrics", "fd", "--steps", 2)
    for more, count in (((), 1), (("--n", 30), 2), (("--n", 30), 2)):
        ((code, said),) = run_ranks(command, 1, *evaluate, *more)
        assert code == 0, said
        found = lines_of(config, "floor")
        assert [line["context"]["n"] for line in found] == [40, 30][:count]
    assert "the first stage alone, of 30 held-out pictures" not in said


def copied(run, place, folder, *overrides):
    shutil.copytree(run.run.path, folder / "tiny")
    return config_of(place, folder, *overrides)


def test_the_report_draws_it_as_the_floor_of_the_curve(tmp_path, place, run):
    config = copied(run, place, tmp_path)
    ((code, said),) = run_ranks(command, 1, "report", config.run.path, "--neighbours", 2, "--features", "pixels")
    assert code == 0, said
    page = (config.run.path / "report.html").read_text()
    assert "first stage alone (rfd_pixels) · N 40" in page
    value = lines_of(run, "floor")[0]["metrics"]["rfd_pixels"]
    (series,) = [
        series
        for chart in re.findall(r'<script type="application/json">(.*?)</script>', page)
        for series in json.loads(chart)["series"]
        if series["name"].startswith("first stage alone")
    ]
    assert [point[:2] for point in series["points"]] == [[144, value], [288, value]]


def test_samples_are_decoded_in_fixed_blocks_and_alike_everywhere(tmp_path, place, run):
    drawn = dtrain.load(run.run.path).sample(7, steps=3, batch_size=5)
    ((code, said),) = run_ranks(command, 1, "sample", run.run.path, "-n", 7, "--steps", 3, "--out", tmp_path / "7.npz")
    assert code == 0, said
    with np.load(tmp_path / "7.npz") as file:
        assert (drawn.dtype, drawn.shape) == (np.uint8, (7, 8, 8, 1))
        assert np.abs(drawn.astype(int) - file["images"]).max() <= 1
    x_0 = torch.randn(5, 4, 4, 4)
    with torch.no_grad():
        expected = as_levels(autoencoder_of(place).decode(x_0 / 0.8 + 0.1).sample)
    for block in (1, 3, 8):
        stage = dtrain.load(run.run.path).first_stage
        stage._decode_block = block
        assert (stage.decode(x_0).float() - expected).abs().max() <= 1
    assert stage.fingerprint == lines_of(run, "eval")[0]["context"]["first_stage"]


def test_the_size_of_its_blocks_is_in_the_context_where_it_is_named(tmp_path, place, run):
    config = copied(run, place, tmp_path, "eval.decode_batch=3", "train.steps=12", "eval.metrics=[fd]")
    assert sampling_of(config.eval)["decode_batch"] == 3
    assert "decode_batch" not in sampling_of(run.eval)
    with pytest.raises(UserError, match=r"eval\.clip holds pixels"):
        config_of(place, tmp_path, "eval.clip=true")


def test_no_other_autoencoder_decodes_a_runs_latents(tmp_path, place, run):
    shutil.copytree(place / "vae", tmp_path / "other")
    config = (tmp_path / "other" / "config.json").read_text()
    (tmp_path / "other" / "config.json").write_text(config.replace("0.8", "0.9"))
    text = (run.run.path / "config.yaml").read_text()
    shutil.copytree(run.run.path, tmp_path / "tiny")
    (tmp_path / "tiny" / "config.yaml").write_text(text.replace(str(place / "vae"), str(tmp_path / "other")))
    for words in (
        ("sample", tmp_path / "tiny", "-n", 2, "--steps", 2, "--out", tmp_path / "some.png"),
        ("evaluate", tmp_path / "tiny", "--n", 4),
    ):
        assert "it was trained with another first stage" in failing(*words)
    with pytest.raises(UserError, match="it was trained with another first stage"):
        dtrain.load(tmp_path / "tiny")


def test_an_exported_folder_draws_the_same(tmp_path, run):
    out = tmp_path / "exported"
    ((code, said),) = run_ranks(command, 1, "checkpoints", "export", run.run.path, "--ema", 0, "--out", out)
    assert code == 0, said
    one, other = (dtrain.load(place).sample(3, steps=2) for place in (out, run.run.path))
    assert np.array_equal(one, other)


def test_pictures_are_inverted_to_the_noise_of_their_latents(place, run):
    held_out = pixels_of(place / "holdout")[:2].permute(0, 2, 3, 1).numpy()
    found = dtrain.load(run.run.path).invert(held_out, steps=4)
    assert found.noise.shape == (2, 4, 4, 4)
    assert found.reconstructions.shape == held_out.shape


def test_the_nearest_of_a_cache_are_its_means_decoded(place, run):
    found = nearest(RunDirectory(run.run.path), run, 2, "pixels", None, lambda _: nullcontext(lambda *_: None))
    with torch.no_grad():
        vae, train = autoencoder_of(place), pixels_of(place / "train")
        shown = as_levels(vae.decode(vae.encode(train / 127.5 - 1).latent_dist.mean).sample)
    both = torch.stack([shown, shown.flip(-1)])  # (2, N, C, H, W)
    distances = torch.cdist(found.samples.flatten(1) / 127.5, both.flatten(0, 1).flatten(1) / 127.5)
    expected = distances.unflatten(1, (2, -1)).min(1).values.topk(5, largest=False).values
    torch.testing.assert_close(found.distances, expected, atol=0.02, rtol=0)
    assert found.neighbours.shape == (2, 5, 1, 8, 8)


def test_the_bound_on_latents_is_in_nats_and_bpd_is_refused_with_its_name(place, tmp_path, run):
    for line in lines_of(run, "eval"):
        parts = [line["metrics"][f"nats_per_dim_latent_{part}"] for part in ("prior", "chain", "decoder")]
        assert line["metrics"]["nats_per_dim_latent"] == pytest.approx(sum(parts))
    with pytest.raises(UserError, match="the bound on the density of latents is nats_per_dim_latent"):
        config_of(place, tmp_path, "eval.metrics=[bpd]")
    with pytest.raises(UserError, match="nats_per_dim_latent is of latents"):
        tiny(place, tmp_path, "eval.metrics=[nats_per_dim_latent]")


def test_a_plan_counts_the_autoencoder(place, tmp_path):
    module = autoencoder_of(place)
    cached, online, exact = (
        plan(config_of(place, tmp_path, "train.steps=100", *more), 1, 1, 80, 0.4, None)
        for more in ((), ONLINE, (*ONLINE, "train.tf32=none"))
    )
    assert cached.first_stage.weights == sum(p.numel() * 4 for p in module.parameters())
    assert cached.first_stage.decoding > 8 * 4 * 8 * 8 * 8  # eight pictures of eight channels
    assert online.first_stage.encoding > 4 * cached.first_stage.encoding
    assert online.stages[0].needed >= cached.stages[0].needed >= cached.first_stage.weights
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.encode(torch.zeros(1, 1, 8, 8))
    attention = 4 * 16**2 * 8  # of 16 places, 8 channels: what torch counts on GPUs alone
    assert online.first_stage.flops_per_image == counter.get_total_flops() + attention
    assert cached.first_stage.flops_per_image == 0
    seconds = 2400 * online.first_stage.flops_per_image / 0.4e12  # of all images, at a peak of 1 TFLOPS
    assert exact.hours - cached.hours == pytest.approx(seconds / 67 / 3600)  # the network is of fp32, too
    assert online.hours - cached.hours == pytest.approx(seconds / 494.5 / 3600)


def test_a_cache_is_read_by_the_bench(place, tmp_path):
    assert list(bench(config_of(place, tmp_path), seconds=0.1)) == ["read", "randomness", "pictures", "whole"]
