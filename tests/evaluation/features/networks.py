"""Feature networks as TorchScript files: in place of downloaded ones, and a user's own that go wrong on some images."""

import warnings
from pathlib import Path

import torch


class Layers(torch.nn.Module):
    """Stands for Inception's layers: 2048 features that depend on every pixel."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 5, stride=4)
        self.pool = torch.nn.AdaptiveAvgPool2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(torch.relu(self.convolution(x)))  # (n, 8, 16, 16): 2048 numbers


class LikeInception(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.output = Layers(), torch.nn.Linear(2048, 1008)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.layers(x).flatten(1))


class Means(torch.nn.Module):
    """A user's network at 16 pixels: the mean of each colour."""

    def __init__(self):
        super().__init__()
        self.size = 16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class Corner(torch.nn.Module):
    """Features (n, 3) of 8 × 8 images: not numbers where the first pixel is above `limit`, black in every digit."""

    limit: float
    size: int

    def __init__(self, limit: float):
        super().__init__()
        self.limit, self.size = limit, 8

    def forward(self, x):
        features = torch.stack(
            [x[:, 0, :4].mean((1, 2)), x[:, 0, 4:].mean((1, 2)), x[:, 0].std((1, 2)), x[:, 0, 3, 3]], 1
        )
        return torch.where(x[:, 0, 0, :1] > self.limit, torch.nan, features)


class Alone(Corner):
    """Raises where one image comes alone."""

    def forward(self, x):
        if x.shape[0] == 1 and bool(x.sum() > 0):
            raise ValueError("one image alone")
        return x[:, 0, :2, :2].flatten(1)


def saved(module: torch.nn.Module, path: Path) -> Path:
    """Write the module as TorchScript; returns the path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(0)
        torch.jit.script(module.eval()).save(str(path))
    return path
