"""VGG16 with random weights, as torchvision names them, and LPIPS' published linear weights beside them."""

from pathlib import Path

import torch
import torchmetrics.functional.image.lpips as torchmetrics_lpips
from torch import nn

LAYERS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def vgg16_features() -> nn.Sequential:
    """torchvision's `vgg16().features`, layer by layer (Simonyan & Zisserman 2015, configuration D)."""
    layers, channels = [], 3
    for out in LAYERS:
        layers += (
            [nn.MaxPool2d(2, 2)] if out == "M" else [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(inplace=True)]
        )
        channels = channels if out == "M" else out
    return nn.Sequential(*layers)


def linear() -> dict[str, torch.Tensor]:
    path = Path(torchmetrics_lpips.__file__).parent / "lpips_models" / "vgg.pth"
    return torch.load(path, map_location="cpu", weights_only=True)


def torchmetrics_own(features: nn.Sequential, monkeypatch) -> nn.Module:
    """torchmetrics' LPIPS with these features: it would take torchvision's, which is not needed for more here."""
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda net, pretrained: features)
    return torchmetrics_lpips._LPIPS(net="vgg", pnet_rand=True).eval()
