"""Distances of features: LPIPS as torchmetrics computes it, and what a gradient reaches."""

import pytest
import torch

from dtrain.config.perceptual import LPIPS, EfficientNetLite0
from dtrain.errors import UserError
from dtrain.objectives.perceptual import build
from tests.objectives.perceptual import torchmetrics_own

CPU = torch.device("cpu")


def pictures(channels=3, side=32):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, channels, side, side, generator=generator) * 2 - 1 for _ in range(2)]


def lpips(file, **keys):
    return build(LPIPS(kind="lpips", file=str(file), **keys), CPU)


def test_lpips_is_torchmetrics_own_and_so_is_its_gradient(file, features, monkeypatch):
    ours, theirs = lpips(file), torchmetrics_own(features, monkeypatch)
    a, b = pictures()
    mine, other = a.clone().requires_grad_(), a.clone().requires_grad_()
    distances, expected = ours(mine, b), theirs(other, b).flatten()
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-7)
    distances.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3 * other.grad.abs().max().item())
    assert all(p.grad is None and not p.requires_grad for p in ours.parameters())


def test_lpips_takes_the_names_of_its_own_package_too(file, tmp_path):
    slices = {0: 1, 2: 1, 5: 2, 7: 2, **dict.fromkeys((10, 12, 14), 3), **dict.fromkeys((17, 19, 21), 4)}
    weights = torch.load(file, weights_only=True)
    renamed = {}
    for name, value in weights.items():
        head, number, *rest = name.split(".")
        named = ["net", f"slice{slices.get(int(number), 5)}", number, *rest] if head == "features" else [name]
        renamed[".".join(named)] = value
    torch.save(renamed, tmp_path / "own.pt")
    a, b = pictures(1, 16)
    one, other = lpips(file), lpips(tmp_path / "own.pt")
    assert torch.equal(one(a, b), other(a, b))
    assert one.fingerprint == other.fingerprint


def test_its_fingerprint_is_of_weights_and_precision(file, tmp_path):
    weights = torch.load(file, weights_only=True)
    weights["features.0.bias"] = weights["features.0.bias"] + 1e-3
    torch.save(weights, tmp_path / "other.pt")
    found = [lpips(file), lpips(tmp_path / "other.pt"), lpips(file, precision="bf16")]
    assert len({one.fingerprint for one in found}) == 3
    a, b = pictures(side=16)
    exact, _, rounded = (one(a, b) for one in found)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded / exact - 1).abs().max() < 0.05


def test_its_precision_is_its_own_under_an_outer_autocast(file):
    distance, (a, b) = lpips(file), pictures(side=16)
    with torch.autocast("cpu", torch.bfloat16):
        within = distance(a, b)
    assert torch.equal(within, distance(a, b))


def test_a_file_that_lacks_weights_is_refused_in_one_line(file, tmp_path):
    weights = torch.load(file, weights_only=True)
    del weights["lin2.model.1.weight"]
    torch.save(weights, tmp_path / "less.pt")
    with pytest.raises(UserError, match=r"no weights of LPIPS on VGG16: lin2.model.1.weight, .* is not there; join"):
        lpips(tmp_path / "less.pt")


def test_features_of_efficientnet_pull_pictures_together():
    """A step against the gradient brings a picture nearer, also one of a single channel."""
    distance = build(EfficientNetLite0(kind="effnet_lite0"), CPU)
    for channels, side in ((1, 48), (3, 32)):
        a, b = pictures(channels, side)
        assert torch.equal(distance(b, b), torch.zeros(2))
        a.requires_grad_()
        before = distance(a, b)
        (gradient,) = torch.autograd.grad(before.sum(), a)
        after = distance(a - 0.1 * gradient / gradient.abs().max(), b)
        assert (after < before).all()
