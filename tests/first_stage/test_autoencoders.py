"""A first stage out of a folder of diffusers: it computes what diffusers does, and is refused where it could not."""

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtrain.checkpoint.export import load_weights, open_checkpoint
from dtrain.config import Config
from dtrain.config.autoencoders import Normalisation, described
from dtrain.errors import NotFinite, UserError
from dtrain.first_stage.build import build
from dtrain.first_stage.requirements import encoder_of
from dtrain.models.build import allocate
from dtrain.run import RunDirectory
from tests.command_line import command
from tests.digits import tiny
from tests.first_stage.folders import latent, save_kl, save_tiny, without
from tests.ranks import run_ranks
from tests.training.runs import trained

FOLDERS = {
    "a scale and a shift, as FLUX": (save_kl, {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "a scale alone, as Stable Diffusion XL": (save_kl, {"scaling_factor": 0.13025}),
    "a mean and a deviation a channel": (
        save_kl,
        {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.5, 1.0], "scaling_factor": 0.5},
    ),
    "no scale": (save_kl, {"scaling_factor": None}),
    "without quantisation layers": (save_kl, {"use_quant_conv": False, "use_post_quant_conv": False}),
    "tiny": (save_tiny, {}),
    "tiny with a shift": (save_tiny, {"scaling_factor": 0.5, "shift_factor": 0.25}),
}


def stage(config: Config):
    return build(config, None, torch.device("cpu"))


def of_diffusers(folder):
    """(the module, (z − shift) · scale and back), as pipelines of diffusers compute it from its own config."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    kind = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    vae = kind[json.loads((folder / "config.json").read_text())["_class_name"]].from_pretrained(folder)
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    if vae.config.get("latents_mean"):
        mean, std = (torch.tensor(vae.config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
        return vae, lambda z: (z - mean) * scale / std, lambda x: x * std / scale + mean
    return vae, lambda z: (z - shift) * scale, lambda x: x / scale + shift


@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_it_encodes_scales_and_decodes_as_diffusers_does(digits, tmp_path, name):
    save, options = FOLDERS[name]
    folder = save(tmp_path / "vae", **options)
    ours, (vae, to_x_0, to_z) = stage(latent(digits, tmp_path, folder)), of_diffusers(folder)
    pixels, noise = torch.rand(5, 1, 8, 8) * 2 - 1, torch.randn(5, 4, 4, 4)
    answer = vae.encode(pixels)
    if save is save_kl:
        mean, std = answer.latent_dist.mean, answer.latent_dist.std
    else:
        mean, std = answer.latents, torch.zeros(5, 4, 4, 4)
    x_0 = ours.of_batch({"image": pixels, "posterior": noise})
    torch.testing.assert_close(x_0, to_x_0(mean + std * noise), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.encode(pixels), to_x_0(mean), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.moments(pixels), torch.stack([mean, std], 1), atol=1e-5, rtol=1e-5)
    decoded = ((vae.decode(to_z(x_0)).sample.clamp(-1, 1) + 1) * 127.5).round()
    assert (ours.decode(x_0).float() - decoded).abs().max() <= 1  # a level, where it lies between two
    assert (ours.decode(x_0) == decoded).float().mean() > 0.99


def test_a_row_is_the_same_in_any_batch_where_blocks_are_of_one(digits, tmp_path, autoencoder):
    ours, pixels = stage(latent(digits, tmp_path, autoencoder)), torch.rand(5, 1, 8, 8)
    together = ours.moments(pixels)
    assert torch.equal(together, torch.cat([ours.moments(row[None]) for row in pixels]))
    larger = stage(latent(digits, tmp_path, autoencoder, "first_stage.block=3"))
    assert larger.moments(pixels[:2]).shape == (2, 2, 4, 4, 4)
    torch.testing.assert_close(larger.moments(pixels), together, atol=1e-5, rtol=1e-5)


def test_it_never_computes_under_another_autocast(digits, tmp_path, autoencoder):
    ours, pixels = stage(latent(digits, tmp_path, autoencoder)), torch.rand(2, 1, 8, 8)
    plain = ours.moments(pixels), ours.decode(ours.encode(pixels))
    with torch.autocast("cpu", torch.bfloat16):
        under = ours.moments(pixels), ours.decode(ours.encode(pixels))
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
    bf16 = stage(latent(digits, tmp_path, autoencoder, "first_stage.precision=bf16"))
    difference = (bf16.moments(pixels) - plain[0]).abs().max()
    assert bf16.moments(pixels).dtype == torch.float32
    assert 1e-4 < difference < 0.1
    assert len({bf16.fingerprint, ours.fingerprint}) == 2


def test_it_has_no_gradient_and_its_latents_can_be_trained_on(digits, tmp_path, autoencoder):
    ours, weight = stage(latent(digits, tmp_path, autoencoder)), torch.ones((), requires_grad=True)
    x_0 = ours.of_batch({"image": torch.rand(2, 1, 8, 8), "posterior": torch.randn(2, 4, 4, 4)})
    assert not x_0.requires_grad
    (weight * x_0).square().sum().backward()
    assert weight.grad is not None


def test_a_picture_that_cannot_be_decoded_to_numbers_is_said(digits, tmp_path, autoencoder):
    with pytest.raises(NotFinite, match="decodes latents to what is not finite"):
        stage(latent(digits, tmp_path, autoencoder)).decode(torch.full((1, 4, 4, 4), torch.inf))


def test_the_scale_of_a_folder_that_names_none_is_that_of_its_class(tmp_path):
    kl = described(save_kl(tmp_path / "kl", scaling_factor=None))
    assert kl.published == Normalisation((0.0,) * 4, (1 / 0.18215,) * 4)
    assert not kl.scale_is_said
    tiny = described(without(save_tiny(tmp_path / "tiny"), ["scaling_factor", "shift_factor"]))
    assert tiny.published == Normalisation((0.0,) * 4, (1.0,) * 4)


def spoil(folder, change):
    tree = json.loads((folder / "config.json").read_text())
    change(tree)
    (folder / "config.json").write_text(json.dumps(tree))


REFUSED = {
    "gone": (lambda f: (f / "config.json").unlink(), "there is no .*config.json"),
    "another class": (lambda f: spoil(f, lambda t: t.update(_class_name="VQModel")), "describes VQModel"),
    "no number": (lambda f: spoil(f, lambda t: t.update(scaling_factor="x")), "scaling_factor is 'x'"),
    "a scale of 0": (lambda f: spoil(f, lambda t: t.update(scaling_factor=0)), "scaling_factor is 0"),
    "two shifts": (
        lambda f: spoil(f, lambda t: t.update(shift_factor=1, latents_mean=[0] * 4)),
        "a shift_factor and latents_mean",
    ),
    "too few means": (lambda f: spoil(f, lambda t: t.update(latents_mean=[0])), "latents_mean has not one number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_describes_no_autoencoder_is_refused(digits, tmp_path, name):
    change, words = REFUSED[name]
    folder = save_kl(tmp_path / "vae")
    change(folder)
    with pytest.raises(UserError, match=words) as e:
        stage(latent(digits, tmp_path, folder))
    assert "\n" not in str(e.value)


def test_weights_that_are_not_the_configs_are_refused_and_never_filled_with_random_ones(digits, tmp_path):
    folder = save_kl(tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({n: w for n, w in weights.items() if n != "decoder.conv_in.weight"}, file)
    with pytest.raises(UserError, match=r"lack decoder\.conv_in\.weight"):
        stage(latent(digits, tmp_path, folder))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="diffusers cannot load") as e:
        stage(latent(digits, tmp_path, folder))
    assert "\n" not in str(e.value)
    file.unlink()
    with pytest.raises(UserError, match=r"there is no .*safetensors"):
        encoder_of(latent(digits, tmp_path, folder).first_stage)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("first_stage.precision=fp16", "overflow in fp16"),
        ("first_stage={kind: kl}", "source is missing, which kl needs"),
        ("first_stage.sauce=x", "unknown key sauce; known are kind, source"),
        ("data.image_size=9", "does not divide by 2"),
        ("eval.metrics=[bpd]", "bpd is of pixels"),
        ("first_stage.statistics=some.json", "statistics has no effect"),
        ("model.patch=3", "the side 4 that first_stage makes of 8"),
    ],
)
def test_what_cannot_go_with_it_is_one_line(digits, tmp_path, autoencoder, override, words):
    with pytest.raises(UserError, match=words) as e:
        latent(digits, tmp_path, autoencoder, override)
    assert "\n" not in str(e.value)


def test_a_cache_has_no_random_crop_and_pixels_no_decoding(digits, tmp_path, autoencoder):
    with pytest.raises(UserError, match=r"first_stage\.cached: a cache holds one crop"):
        latent(digits, tmp_path, autoencoder, "first_stage.cached=true", "data.crop=random")
    with pytest.raises(UserError, match=r"eval\.decode_batch has no effect"):
        tiny(digits, tmp_path, "eval.decode_batch=4")


def test_a_run_of_ours_is_taken_by_the_command_that_its_refusal_names(digits, tmp_path):
    own = "model={name: kl_autoencoder, width: 8, multipliers: [1, 2], res_blocks: 1, latent_channels: 2}"
    run = tiny(digits, tmp_path, own, "objective={kind: autoencoding}", "train.steps=1", "run.name=own")
    trained(run, 1)
    with pytest.raises(UserError) as e:
        described(run.run.path)
    (printed,) = [part for part in str(e.value).split(": ") if part.startswith("dtrain checkpoints")]
    words, _, taken = printed.partition("; and take ")
    ((code, text),) = run_ranks(command, 1, *shlex.split(words)[1:])
    assert code == 0, text
    with pytest.raises(UserError, match=rf"; take {taken}$"):
        described(run.run.path)
    pixels = torch.rand(3, 1, 8, 8) * 2 - 1
    average = load_weights(open_checkpoint(RunDirectory(run.run.path)), allocate(run), "ema_0").eval()
    with torch.no_grad():
        mean = average(pixels, torch.zeros(3, 2, 4, 4)).mean
    found = stage(latent(digits, tmp_path, taken)).moments(pixels)[:, 0]
    torch.testing.assert_close(found, mean, atol=1e-5, rtol=1e-5)
