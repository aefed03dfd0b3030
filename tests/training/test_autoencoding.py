"""An autoencoder trained as a run: its losses by hand, and the same on any number of ranks and at any ZeRO stage."""

import json

import pytest
import torch
from PIL import Image

from dtrain.checkpoint.export import export, load_weights, open_checkpoint
from dtrain.data.fields.picture import normalize, quantize
from dtrain.data.fields.samples import read_split
from dtrain.data.shards.manifest import load_all, load_holdout
from dtrain.data.stream import Completion, StepDataset
from dtrain.errors import UserError
from dtrain.evaluation.names import OF_LATENTS
from dtrain.models.build import allocate, build
from dtrain.run import RunDirectory
from dtrain.tracking.journal import read
from dtrain.training.check import warnings
from tests.checkpoint.exported import run_readme_in_a_fork
from tests.command_line import command
from tests.digits import losses, tiny
from tests.longer import longer
from tests.ranks import run_ranks
from tests.training.by_hand import move
from tests.training.runs import train

MODEL = "model={name: kl_autoencoder, width: 8, multipliers: [1, 2], res_blocks: 1, latent_channels: 2}"
OBJECTIVE = "objective={kind: autoencoding, kl_weight: 0.01}"


def autoencoder(digits, folder, *overrides):
    return tiny(digits, folder, MODEL, OBJECTIVE, "train.steps=6", *overrides)


def by_hand(config, steps, batch_size):
    """Plain PyTorch: AdamW on the mean of |x − x̂| + w·KL of every picture of the same batches."""
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=config.optim.betas, weight_decay=0.0)
    data, complete, found = StepDataset(config, load_all(config.data), 0, 1, 0), Completion(config), []
    for step in range(steps):
        batch = complete(data[step])
        x = batch["image"]
        pixels, mean, log_variance, _ = model(x, batch["posterior"])
        posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
        kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
        loss = ((pixels - x).abs().flatten(1).sum(1) + 0.01 * kl).mean() / x[0].numel()
        rate = config.optim.lr * min(1, (step + 1) / config.optim.warmup_steps)
        move(model, optimizer, loss, rate, config.optim.gradient_clip)
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("stage", "ranks"), [longer(0, 1), longer(2, 2), (3, 2)])
def test_its_losses_are_those_of_plain_pytorch(digits, tmp_path, stage, ranks):
    config = autoencoder(digits, tmp_path, f"deepspeed.zero_stage={stage}")
    run_ranks(train, ranks, config)
    assert losses(config) == pytest.approx(by_hand(config, 6, 24), rel=1e-5)


def test_it_reports_its_terms_and_no_loss_by_noise_level(digits, tmp_path):
    config = autoencoder(digits, tmp_path, "objective.reconstruction=l2", "objective.kl_weight=0")
    run_ranks(train, 1, config)
    for line in read(config.run.path / "journal.jsonl"):
        if line["event"] == "train":
            metrics = line["metrics"]
            assert metrics["loss"] == pytest.approx(metrics["mse"], rel=1e-6)
            assert metrics["kl"] > 0
            assert not any(name.startswith("loss_level") for name in metrics)
    checkpoint = json.loads((config.run.path / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert "encoder.conv_in.weight:ema_0" in checkpoint["tensors"]


def psnr_and_ssim(config, model):
    """By hand over all held-out digits: the mean over pictures, and torchmetrics' module."""
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    split = load_holdout(config.data)
    images, _ = read_split(split, split.place, 8, 1, 0, 48)
    with torch.no_grad():
        drawn = quantize(model.decode(model.encode(normalize(images))[0])).double()
    psnr = PeakSignalNoiseRatio(data_range=255.0, reduction="elementwise_mean", dim=(1, 2, 3))
    return psnr(drawn, images.double()).item(), StructuralSimilarityIndexMeasure(data_range=255.0)(
        drawn, images.double()
    ).item()


def drawn_latents(config, model, seed):
    """Of all held-out digits, one sample of each posterior."""
    split, generator = load_holdout(config.data), torch.Generator().manual_seed(seed)
    images, _ = read_split(split, split.place, 8, 1, 0, 48)
    with torch.no_grad():
        mean, log_variance = model.encode(normalize(images))
    return torch.normal(mean, (log_variance / 2).exp(), generator=generator)


def test_it_is_evaluated_by_what_it_gives_back_in_training_and_after_on_any_number_of_ranks(digits, tmp_path):
    config = autoencoder(digits, tmp_path, "eval.every=6", "eval.features=pixels", "optim.lr=5e-3", "train.steps=12")
    run_ranks(train, 2, config)
    first, last = (line for line in read(config.run.path / "journal.jsonl") if line["event"] == "eval")
    assert last["metrics"].keys() >= {"rfd_pixels", "psnr", "ssim", "seconds"}
    assert last["metrics"]["psnr"] > first["metrics"]["psnr"]
    model = load_weights(open_checkpoint(RunDirectory(config.run.path)), allocate(config), "ema_0").eval()
    psnr, ssim = psnr_and_ssim(config, model)
    assert last["metrics"]["psnr"] == pytest.approx(psnr, rel=1e-6)
    assert last["metrics"]["ssim"] == pytest.approx(ssim, rel=1e-6)
    samples = torch.cat([drawn_latents(config, model, seed) for seed in range(8)])
    assert last["metrics"]["latent_mean"] == pytest.approx(samples.mean().item(), abs=0.02)
    assert last["metrics"]["latent_std"] == pytest.approx(samples.std().item(), rel=0.02)
    for ranks in (1, 3):
        code, said = run_ranks(command, ranks, "evaluate", str(config.run.path), "--json")[0]
        assert code == 0, said
        again = json.loads(said.splitlines()[-1])["metrics"]
        latents = {name: again.pop(name) for name in OF_LATENTS}  # of float32, and not of 8-bit pixels
        assert again == pytest.approx({name: last["metrics"][name] for name in again}, rel=1e-9)
        assert latents == pytest.approx({name: last["metrics"][name] for name in latents}, rel=1e-5)
    with Image.open(config.run.path / "samples" / "step-00000012.png") as picture:
        assert picture.size == (4 * (8 * 9 - 1), 4 * (16 * 9 - 1))  # eight rows of originals, eight of what came back


def test_it_is_sampled_from_its_prior_alone_and_not_inverted(digits, tmp_path):
    config = autoencoder(digits, tmp_path)
    run_ranks(train, 1, config)
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    for arguments, message in (
        (["sample", str(config.run.path)], "is an autoencoder, and eval.images is reconstructions"),
        (["invert", str(config.run.path), str(tmp_path / "black.png")], "is an autoencoder, which walks from no noise"),
    ):
        ((code, said),) = run_ranks(command, 1, *arguments)
        assert code == 2
        assert message in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective={kind: denoising}"], "autoencoding trains a kl_autoencoder, and nothing else does"),
        (["model.multipliers=[1,2,2,2,2]"], "does not halve 4 times"),
        (["model.width=6"], "must be a multiple of 4"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(digits, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        autoencoder(digits, tmp_path, *overrides)


def test_a_tiny_weight_of_the_divergence_is_warned_of_as_leaving_no_prior(digits, tmp_path):
    tiny_weight, whole = (warnings(autoencoder(digits, tmp_path, f"objective.kl_weight={w}")) for w in (1e-6, 0.5))
    assert any(line.startswith("objective.kl_weight 1e-06: it leaves the latents no prior") for line in tiny_weight)
    assert not any("prior" in line for line in whole)


def test_exported_it_is_diffusers_own_and_the_first_stage_of_a_training(digits, tmp_path):
    """The whole path: an autoencoder trained, exported, its latents measured, and a DiT trained and drawn on them."""
    from diffusers import AutoencoderKL

    config = autoencoder(digits, tmp_path)
    run_ranks(train, 1, config)
    folder = tmp_path / "vae"
    said = export(RunDirectory(config.run.path), folder, None, 0, "fp32", "diffusers")
    assert said.startswith(f"{folder}: ema_0 of step 6, ")
    model = load_weights(open_checkpoint(RunDirectory(config.run.path)), allocate(config), "ema_0").eval()
    theirs, x = AutoencoderKL.from_pretrained(folder), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x).latent_dist.mean, model.encode(x)[0], rtol=1e-5, atol=1e-5)
    assert run_readme_in_a_fork(folder, tmp_path).exists()
    statistics = tmp_path / "latents.json"
    arguments = ["encode", f"{digits}/train", str(statistics), "--first-stage", str(folder), "--size", "8"]
    ((code, said),) = run_ranks(command, 1, *arguments, "--statistics-only", "--block", 64)
    assert code == 0, said
    more = [f"first_stage={{kind: kl, source: {folder}, normalise: dataset, statistics: {statistics}, block: 64}}"]
    latent = tiny(digits, tmp_path, "run.name=latent", "eval.every=4", "train.steps=4", "eval.features=pixels", *more)
    run_ranks(train, 1, latent)
    evaluation = next(line for line in read(latent.run.path / "journal.jsonl") if line["event"] == "eval")
    assert evaluation["metrics"]["fd_pixels"] > 0
