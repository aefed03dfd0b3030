"""The autoencoder of latent diffusion (Rombach et al. 2022): pictures to a Gaussian over latents, and latents back.

Parameters have the names of diffusers' AutoencoderKL, so that folders go both ways without a table.

Shapes: N rows, C channels of a picture, Z of a latent; f = 2^(levels − 1), h = H/f, w = W/f.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain.models.layers import Conv2d, Linear, xavier_uniform
from dtrain.models.unet import Upsample, group_norm

LOG_VARIANCE = (-30.0, 20.0)  # what a posterior's is held in, so that no deviation overflows


class Reconstruction(NamedTuple):
    """pixels (N, C, H, W) of a latent drawn from the posterior; mean and log_variance (N, Z, h, w) of that.

    features: (N, D, H, W), what the decoder's last convolution made the pixels of, detached.
    """

    pixels: Tensor
    mean: Tensor
    log_variance: Tensor
    features: Tensor


class ResidualBlock(nn.Module):
    """Two convolutions added to the input."""

    def __init__(self, channels: int, out: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(channels, groups)
        self.conv1 = Conv2d(channels, out, 3, padding=1)
        self.norm2 = group_norm(out, groups)
        self.conv2 = Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (N, C, H, W)
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))  # (N, C, H, W)


class Attention(nn.Module):
    """Self-attention of one head over all places, added to the input."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (N, 1, H·W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))[:, 0]  # (N, H·W, C)
        return x + self.to_out[0](h).transpose(1, 2).unflatten(2, x.shape[2:])  # (N, C, H, W)


class Halve(nn.Module):
    """A convolution with stride 2, the picture padded below and on the right, as LDM's."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (N, C, H/2, W/2)


class Level(nn.Module):
    """The blocks at one resolution, and the way to the next or none."""

    def __init__(self, channels: int, out: int, blocks: int, groups: int, between: tuple[str, nn.Module] | None):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels if i == 0 else out, out, groups) for i in range(blocks))
        if between is not None:
            name, resample = between
            setattr(self, name, nn.ModuleList([resample]))
        self._between = between and between[0]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x if self._between is None else getattr(self, self._between)[0](x)


class Middle(nn.Module):
    """Two blocks at the lowest resolution, attention between them where there is any."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))
        if attention:
            self.attentions = nn.ModuleList([Attention(channels, groups)])
        self._attention = attention

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        return self.resnets[1](self.attentions[0](x) if self._attention else x)


class Encoder(nn.Module):
    def __init__(self, channels: int, widths: Sequence[int], blocks: int, out: int, groups: int, attention: bool):
        super().__init__()
        self.conv_in = Conv2d(channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        before, last = widths[0], len(widths) - 1
        for i, width in enumerate(widths):
            between = None if i == last else ("downsamplers", Halve(width))
            self.down_blocks.append(Level(before, width, blocks, groups, between))
            before = width
        self.mid_block = Middle(before, groups, attention)
        self.conv_norm_out = group_norm(before, groups)
        self.conv_out = Conv2d(before, out, 3, padding=1)

    def forward(self, x: Tensor, run) -> Tensor:
        x = self.conv_in(x)
        for level in (*self.down_blocks, self.mid_block):
            x = run(level, x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, channels: int, widths: Sequence[int], blocks: int, out: int, groups: int, attention: bool):
        super().__init__()
        before = widths[-1]
        self.conv_in = Conv2d(channels, before, 3, padding=1)
        self.mid_block = Middle(before, groups, attention)
        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            between = ("upsamplers", Upsample(width)) if i else None
            self.up_blocks.append(Level(before, width, blocks + 1, groups, between))
            before = width
        self.conv_norm_out = group_norm(before, groups)
        self.conv_out = Conv2d(before, out, 3, padding=1)

    def forward(self, z: Tensor, run) -> tuple[Tensor, Tensor]:
        """(pixels, the last convolution's input)."""
        z = self.conv_in(z)
        for level in (self.mid_block, *self.up_blocks):
            z = run(level, z)
        features = F.silu(self.conv_norm_out(z))
        return self.conv_out(features), features


def _called(level: nn.Module, x: Tensor) -> Tensor:
    return level(x)


def _recomputed(level: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(level, x, use_reentrant=False, preserve_rng_state=False)


class KLAutoencoder(nn.Module):
    """The constructor only allocates; `layers.initialize` gives the weights.

    widths: channels of each level, from the full side down; each level after the first halves the side. attention: at
    the lowest resolution, of one head. groups: of the norms, 32 or fewer with at least four channels each: a group of
    one channel would take a picture's brightness away.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], res_blocks: int, latent_channels: int, attention: bool = True
    ):
        super().__init__()
        self.channels, self.widths, self.res_blocks = channels, list(widths), res_blocks
        self.latent_channels, self.attention, self.downscale = latent_channels, attention, 2 ** (len(widths) - 1)
        assert not any(width % 4 for width in widths)
        self.groups = math.gcd(32, *(width // 4 for width in widths))
        self.activation_checkpointing = False  # recompute each level's activations in backward
        self.encoder = Encoder(channels, widths, res_blocks, 2 * latent_channels, self.groups, attention)
        self.decoder = Decoder(latent_channels, widths, res_blocks, channels, self.groups, attention)
        self.quant_conv = Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = Conv2d(latent_channels, latent_channels, 1)

    def forward(self, x: Tensor, noise: Tensor) -> Reconstruction:
        """x (N, C, H, W) in [−1, 1], noise (N, Z, h, w) standard normal; float32 whatever the weights compute in."""
        mean, log_variance = self.encode(x)
        latent = mean + torch.exp(0.5 * log_variance) * noise
        pixels, features = self._decoded(latent)
        return Reconstruction(pixels, mean, log_variance, features.detach())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (N, Z, h, w) of the posterior, float32."""
        moments = self.quant_conv(self.encoder(x.to(self.quant_conv.weight.dtype), self._run))
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures (N, C, H, W), float32, not held in [−1, 1]."""
        return self._decoded(latent)[0]

    def _decoded(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.post_quant_conv(latent.to(self.post_quant_conv.weight.dtype))
        pixels, features = self.decoder(latent, self._run)
        return pixels.float(), features

    @property
    def _run(self):
        return _recomputed if self.activation_checkpointing and self.training else _called

    @staticmethod
    def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Biases begin at 0, norms at 1, the rest by Glorot's law; what ends a residual branch at 0."""
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        if name.endswith((".conv2.weight", ".to_out.0.weight")):
            return torch.zeros(shape)
        return xavier_uniform(name, shape, seed, fan_out=shape[0] * math.prod(shape[2:]))
