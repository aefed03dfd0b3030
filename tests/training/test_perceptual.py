"""A run with a perceptual distance: its file may lie elsewhere when it goes on, and may hold no other weights."""

import shutil

import pytest
import torch

from dtrain.errors import UserError
from tests.command_line import command
from tests.digits import losses, tiny
from tests.objectives.perceptual import linear, vgg16_features
from tests.ranks import run_ranks
from tests.training.critic import metrics, with_critic
from tests.training.runs import train


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.pt"
    torch.manual_seed(0)
    torch.save({f"features.{name}": value for name, value in vgg16_features().state_dict().items()} | linear(), path)
    return path


def run(digits, folder, file, steps):
    keys = {"critic": "null", "perceptual": f"{{kind: lpips, file: {file}, weight: 0.5}}"}
    how = "data.image_size=16", "data.batch_size=4", f"train.steps={steps}"
    return with_critic(digits, folder, *how, **keys)


def refused(config):
    with pytest.raises(UserError) as e:
        train(config)
    return str(e.value)


def test_it_goes_on_with_the_same_weights_elsewhere_and_with_no_others(digits, tmp_path, file):
    run_ranks(train, 2, run(digits, tmp_path, file, 2))
    moved = shutil.copy(file, tmp_path / "moved.pt")
    config = run(digits, tmp_path, moved, 3)
    run_ranks(train, 2, config)
    for line in metrics(config):
        error = line["loss"] - 0.5 * line["perceptual"] - 0.01 * line["kl"] / 16**2
        assert line["perceptual"] > 0
        assert 0 < error < 2  # the mean absolute one, of pixels in [−1, 1]
    weights = torch.load(file, weights_only=True)
    weights["lin0.model.1.weight"] = weights["lin0.model.1.weight"] * 2
    torch.save(weights, moved)
    for said in run_ranks(refused, 2, run(digits, tmp_path, moved, 4)):
        assert "it was trained with another objective.perceptual, whose weights it does not hold" in said
    (said,) = run_ranks(refused, 1, run(digits, tmp_path, tmp_path / "nowhere.pt", 4))
    assert said == f"objective.perceptual.file names {tmp_path}/nowhere.pt, which is no file"


@pytest.fixture(scope="module")
def pairs(digits, tmp_path_factory):
    """Of noise and 16 × 16 samples of a flow of one step."""
    folder = tmp_path_factory.mktemp("pairs")
    config = tiny(digits, folder, "diffusion={process: flow}", "data.image_size=16", "train.steps=1")
    run_ranks(train, 1, config)
    arguments = ("pairs", config.run.path, folder / "made", "-n", 24, "--sampler", "euler", "--steps", 2)
    code, said = run_ranks(command, 1, *arguments)[0]
    assert code == 0, said
    return folder / "made"


def of_one_step(digits, pairs, folder, file, steps, *more):
    perceptual = f"{{kind: lpips, file: {file}, weight: 0.5}}"
    coupled = f"diffusion={{process: flow, coupling: data, times: one, perceptual: {perceptual}}}"
    size = "data.image_size=16", "data.batch_size=4", f"train.steps={steps}"
    return tiny(digits, folder, f"data.shards={pairs}", coupled, *size, "train.checkpoint_every=2", *more)


def test_a_flow_of_one_step_is_pulled_by_it_on_any_ranks_and_goes_on_with_no_other_weights(
    digits, pairs, tmp_path, file
):
    one = of_one_step(digits, pairs, tmp_path / "one", file, 4)
    run_ranks(train, 1, one)
    for line in metrics(one):
        assert line["perceptual"] > 0
        assert line["loss"] == pytest.approx(line["mse"] + 0.5 * line["perceptual"], rel=1e-5)
    two = of_one_step(digits, pairs, tmp_path / "two", file, 2, "deepspeed.zero_stage=3")
    run_ranks(train, 2, two)
    assert losses(two) == pytest.approx(losses(one)[:2], rel=1e-5)
    half = of_one_step(digits, pairs, tmp_path / "half", file, 2)
    run_ranks(train, 1, half)
    moved = shutil.copy(file, tmp_path / "moved.pt")
    run_ranks(train, 1, of_one_step(digits, pairs, tmp_path / "half", moved, 4))
    assert losses(half) == losses(one)
    weights = torch.load(file, weights_only=True)
    torch.save(weights | {"lin0.model.1.weight": weights["lin0.model.1.weight"] * 2}, moved)
    (said,) = run_ranks(refused, 1, of_one_step(digits, pairs, tmp_path / "half", moved, 6))
    assert "it was trained with another diffusion.perceptual, whose weights it does not hold" in said
    (said,) = run_ranks(refused, 1, of_one_step(digits, pairs, tmp_path / "half", tmp_path / "nowhere.pt", 6))
    assert said == f"diffusion.perceptual.file names {tmp_path}/nowhere.pt, which is no file"


def test_where_no_picture_is_drawn_in_one_step_it_is_refused(digits, tmp_path):
    lpips = "perceptual: {kind: lpips, file: x}"
    one = "process: flow, coupling: data, times: one"
    latents = "first_stage={kind: kl, source: x, latent_channels: 4, downscale: 2}"
    cases = {
        (f"diffusion={{process: flow, {lpips}}}",): "cannot go with times uniform: before the end of its walk",
        (f"diffusion={{{one}, {lpips}}}",): "data.image_size 8 is too small for diffusion.perceptual lpips, .* 16 and",
        (f"diffusion={{{one}, {lpips}}}", latents): "sees pictures, and first_stage.kind kl gives latents; leave it",
    }
    for overrides, message in cases.items():
        with pytest.raises(UserError, match=message):
            tiny(digits, tmp_path, *overrides)
