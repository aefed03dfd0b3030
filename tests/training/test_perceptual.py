"""A run with a perceptual distance: its file may lie elsewhere when it goes on, and may hold no other weights."""

import shutil

import pytest
import torch

from dtrain.errors import UserError
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
