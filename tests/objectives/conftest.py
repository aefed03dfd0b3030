"""Weights of LPIPS that are drawn, in a file as users have it."""

import pytest
import torch

from tests.objectives.perceptual import linear, vgg16_features


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(0)
    return vgg16_features()


@pytest.fixture(scope="module")
def file(features, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.pt"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()} | linear(), path)
    return path
