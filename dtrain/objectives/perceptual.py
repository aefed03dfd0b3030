"""A distance of pictures by a frozen network's features, differentiable with respect to the pictures.

    d(x, x̂) = Σ_layers mean_places Σ_channels w · (f(x) − f(x̂))²,   f of length 1 at each place    (Zhang et al. 2018)

The network stands beside DeepSpeed: it is neither partitioned nor saved, and computes in a precision of its own.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dtrain.config.perceptual import LPIPS as LPIPSSection
from dtrain.config.perceptual import EfficientNetLite0 as EfficientNetSection
from dtrain.errors import UserError
from dtrain.models.efficientnet import efficientnet_lite0
from dtrain.models.weight_file import read_weights

TINY = 1e-8  # under the root of a length, whose slope at 0 would be infinite
VGG16 = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]  # channels, a pooling between
# Both what torchvision and what LPIPS' own package calls VGG16's convolutions; the number is torchvision's.
_CONVOLUTION = re.compile(r"(?:features|(?:net\.)?slice\d)\.(\d+)\.(weight|bias)")
_LINEAR = re.compile(r"(?:lins\.|lin)(\d)\.(?:model\.\d\.)?weight")


class Distance(nn.Module):
    """(N,) of pictures x and x̂ (N, 1 or 3, H, W) in [−1, 1]. Gradients reach x̂, and none of the weights."""

    precision: str
    fingerprint: str

    def layers(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (N, C, h, w) of pictures (N, 3, H, W), layer by layer, with weights that broadcast with them."""
        raise NotImplementedError

    def forward(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([reconstruction, x]).expand(-1, 3, -1, -1)
        distance = 0.0
        # Off also where an autocast of the training is on: only this network's own precision counts.
        with torch.autocast(both.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            for features, weight in self.layers(both):
                features = features.float()
                ours, theirs = (features / (features.square().sum(1, keepdim=True) + TINY).sqrt()).chunk(2)
                distance = distance + ((ours - theirs).square() * weight).sum(1).mean((1, 2))
        return distance


class LPIPS(Distance):
    """Learned perceptual image patch similarity on VGG16, version 0.1.

    weights: as torchvision's VGG16 and LPIPS name them, in one dict. Raises UserError where it has others.
    """

    def __init__(self, weights: Mapping[str, Tensor], source: str, precision: str):
        super().__init__()
        self.precision = precision
        found = {m.groups(): value for name, value in weights.items() if (m := _CONVOLUTION.fullmatch(name))}
        linear = {int(m[1]): value for name, value in weights.items() if (m := _LINEAR.fullmatch(name))}
        self.slices, before, number = nn.ModuleList(), 3, 0
        for block in VGG16:
            layers = [nn.MaxPool2d(2)] if len(self.slices) else []
            number += len(layers)
            for channels in block:
                layer = nn.utils.skip_init(nn.Conv2d, before, channels, 3, padding=1)
                for part, own in layer.named_parameters():
                    _write(own, found.get((str(number), part)), f"features.{number}.{part}", source)
                layers += [layer, nn.ReLU()]
                before, number = channels, number + 2
            self.slices.append(nn.Sequential(*layers))
        for i, block in enumerate(VGG16):
            self.register_buffer(f"linear{i}", torch.empty(1, block[-1], 1, 1))
            _write(getattr(self, f"linear{i}"), linear.get(i), f"lin{i}.model.1.weight", source)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def layers(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        x = (x - self.shift) / self.scale
        for i, part in enumerate(self.slices):
            x = part(x)
            yield x, getattr(self, f"linear{i}")


class EfficientNetLite0(Distance):
    """The last features of every resolution, at the picture's own size; channels count alike. No LPIPS."""

    def __init__(self, network: nn.Module, precision: str):
        super().__init__()
        self.network, self.precision = network, precision

    def layers(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        network, one = self.network, x.new_ones(())
        h = network._swish(network._bn0(network._conv_stem((x * 127.5 + 0.5) / 128)))  # as (level − 127) / 128
        for block in network._blocks:
            before, h = h, block(h)
            if h.shape[2] < before.shape[2]:
                yield before, one
        yield h, one


def build(section: LPIPSSection | EfficientNetSection, device: torch.device) -> Distance:
    """The distance that a section `perceptual` names. Raises UserError where its weights cannot be had."""
    if section.kind == "lpips":
        path = Path(section.file)
        distance = LPIPS(read_weights(path), str(path), section.precision)
        definition = "lpips vgg 0.1"
    else:
        distance, definition = EfficientNetLite0(_efficientnet(), section.precision), "effnet_lite0 at the own size"
    distance.fingerprint = _fingerprint(f"{definition} in {section.precision}", distance)
    return distance.eval().requires_grad_(False).to(device)


def _efficientnet() -> nn.Module:
    try:
        return efficientnet_lite0()[0]
    except ImportError:
        raise UserError("perceptual effnet_lite0 needs the extra: pip install 'dtrain[effnet]'") from None


def _write(own: Tensor, value: Tensor | None, name: str, source: str) -> None:
    if value is None or tuple(value.shape) != tuple(own.shape):
        there = "is not there" if value is None else f"has the shape {list(value.shape)}"
        raise UserError(
            f"{source} has no weights of LPIPS on VGG16: {name}, {list(own.shape)}, {there}; join the state dicts of "
            "torchvision's vgg16 and of LPIPS' linear layers in one file"
        )
    own.detach().copy_(value)


def _fingerprint(definition: str, module: nn.Module) -> str:
    digest = hashlib.sha256(definition.encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
