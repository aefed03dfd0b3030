"""The UNet of DDPM and ADM (Ho et al. 2020; Dhariwal & Nichol 2021).

Shapes: N rows, C channels of a level, E width of the condition, H × W its image; O channels out.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain.models.dropout import dropout
from dtrain.models.fourier import channels_with_waves, with_waves
from dtrain.models.layers import (
    Attention,
    ConditionNetworks,
    Conv2d,
    CrossAttention,
    LabelEmbedder,
    Linear,
    TimestepEmbedder,
    Tokens,
    normal,
    xavier_uniform,
)

EPS = 1e-6  # of group norms, unless a model says otherwise


def group_norm(channels: int, groups: int, eps: float = EPS) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=eps)


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)  # (N, C, H/2, W/2)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")  # (N, C, 2H, 2W)


class ResidualBlock(nn.Module):
    """Two convolutions around the condition, added to the input.

    resample: halves or doubles the side, of the input and before the first convolution (ADM's way between levels).
    """

    def __init__(
        self,
        channels: int,
        out: int,
        embedding: int,
        groups: int,
        scale_shift: bool,
        dropout: float,
        layer: int,
        eps: float = EPS,
        resample: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.scale_shift, self.dropout, self.layer, self.resample = scale_shift, dropout, layer, resample
        self.norm1 = group_norm(channels, groups, eps)
        self.conv1 = Conv2d(channels, out, 3, padding=1)
        self.condition = Linear(embedding, 2 * out if scale_shift else out)
        self.norm2 = group_norm(out, groups, eps)
        self.conv2 = Conv2d(out, out, 3, padding=1)
        self.skip = Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor, keys: Tensor | None) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)  # (N, C, H, W)
        c = self.condition(F.silu(c))[:, :, None, None]  # (N, C or 2C, 1, 1)
        if self.scale_shift:
            scale, shift = c.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + c)
        h = F.silu(h)
        if keys is not None:
            h = dropout(h, self.dropout, keys, self.layer)
        return self.skip(x) + self.conv2(h)  # (N, C, H, W)


class AttentionBlock(nn.Module):
    """Self-attention over all places of the image, added to the input.

    told: channels of the tokens of conditions that each place then attends to, where there are any.
    """

    def __init__(self, channels: int, heads: int, groups: int, eps: float = EPS, told: int | None = None):
        super().__init__()
        self.norm = group_norm(channels, groups, eps)
        self.attn = Attention(channels, heads)
        if told is not None:
            self.norm_cross = group_norm(channels, groups, eps)
            self.cross = CrossAttention(channels, heads, told)

    def forward(self, x: Tensor, told: Tokens | None = None) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (N, H·W, C)
        x = x + self.attn(h).transpose(1, 2).unflatten(2, x.shape[2:])  # (N, C, H, W)
        if told is not None:
            h = self.norm_cross(x).flatten(2).transpose(1, 2)  # (N, H·W, C)
            x = x + self.cross(h, *told).transpose(1, 2).unflatten(2, x.shape[2:])  # (N, C, H, W)
        return x


class Upsample(nn.Module):
    """Twice the side: each pixel becomes four, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_doubled(x))  # (N, C, 2H, 2W)


class Level(nn.Module):
    """The blocks at one resolution, each with its attention or none, and the way to the next resolution or none."""

    def __init__(self, blocks: list[nn.Module], attentions: list[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample


def _called(block: nn.Module, *inputs: Tensor | None) -> Tensor:
    return block(*inputs)


def _recomputed(block: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Keyed dropout drops the same again, so no generator state need be kept for the second time."""
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


class Context(NamedTuple):
    """What all blocks of a forward take: c (N, E) of time and vectors, words of dropout (N,), tokens of conditions."""

    c: Tensor
    keys: Tensor | None
    told: Tokens | None


def _attended(attention: nn.Module, h: Tensor, context: Context) -> Tensor:
    return attention(h) if isinstance(attention, nn.Identity) else attention(h, context.told)


class UNet(nn.Module):
    """ε_θ(x_t, t, y) for square images whose side halves once a level.

    The constructor only allocates; `layers.initialize` gives the weights (`models.build.build` does both). With
    num_classes > 0 labels run from 0 to num_classes, and num_classes itself is the null label; with num_classes = 0
    the model is unconditional and ignores them. learn_sigma doubles the output channels: the second half describes
    the variance. resblock_updown: residual blocks change the side between levels, as ADM's do, instead of single
    convolutions. group_norm_eps: 1e-5 in ADM. cross: where it attends, each place attends to the tokens of `conditions`
    too, of which one at least makes some. fourier: octaves of the waves that it sees beside each channel
    (`fourier.with_waves`).
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        width: int,
        multipliers: list[int],
        res_blocks: int,
        attention: list[int],
        num_classes: int,
        head_width: int | None = None,
        scale_shift: bool = False,
        dropout: float = 0.0,
        learn_sigma: bool = False,
        resblock_updown: bool = False,
        group_norm_eps: float = EPS,
        cross: bool = False,
        fourier: Sequence[int] = (),
    ):
        super().__init__()
        assert image_size % 2 ** (len(multipliers) - 1) == width % 4 == 0
        self.image_size = image_size
        self.channels = channels
        self.out_channels = 2 * channels if learn_sigma else channels
        self.num_classes = num_classes
        self.width, self.multipliers, self.res_blocks = width, list(multipliers), res_blocks
        self.attention, self.head_width, self.scale_shift, self.dropout = (
            list(attention), head_width, scale_shift, dropout
        )  # fmt: skip
        self.groups, self.eps, self.resblock_updown = math.gcd(32, width), group_norm_eps, resblock_updown
        self.activation_checkpointing = False  # recompute each block's activations in backward
        embedding = 4 * width
        told = embedding if cross else None
        layer = 0

        def block(inputs: int, out: int, resample=None) -> ResidualBlock:
            nonlocal layer
            layer += 1
            how = self.groups, scale_shift, dropout, layer, group_norm_eps, resample
            return ResidualBlock(inputs, out, embedding, *how)

        def halving(out: int) -> nn.Module:
            return block(out, out, _halved) if resblock_updown else Conv2d(out, out, 3, stride=2, padding=1)

        def doubling(out: int) -> nn.Module:
            return block(out, out, _doubled) if resblock_updown else Upsample(out)

        def attend(out: int, side: int) -> nn.Module:
            if side not in attention:
                return nn.Identity()
            return AttentionBlock(out, out // (head_width or out), self.groups, group_norm_eps, told)

        self.t_embedder = TimestepEmbedder(embedding, frequencies=width)
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, embedding)
        self.condition_width = embedding
        self.conditions = ConditionNetworks()
        self.fourier = tuple(fourier)
        self.conv_in = Conv2d(channels_with_waves(channels, self.fourier), width, 3, padding=1)

        self.down = nn.ModuleList()
        skips, here = [width], width
        for i, multiplier in enumerate(multipliers):
            out, side, last = width * multiplier, image_size >> i, i + 1 == len(multipliers)
            blocks = [block(here if j == 0 else out, out) for j in range(res_blocks)]
            attentions = [attend(out, side) for _ in blocks]
            self.down.append(Level(blocks, attentions, None if last else halving(out)))
            skips += [out] * (res_blocks if last else res_blocks + 1)
            here = out

        self.middle1 = block(here, here)
        self.middle_attention = AttentionBlock(here, here // (head_width or here), self.groups, group_norm_eps, told)
        self.middle2 = block(here, here)

        self.up = nn.ModuleList()
        for i, multiplier in reversed(list(enumerate(multipliers))):
            out, side = width * multiplier, image_size >> i
            blocks, attentions = [], []
            for _ in range(res_blocks + 1):
                blocks.append(block(here + skips.pop(), out))
                attentions.append(attend(out, side))
                here = out
            self.up.append(Level(blocks, attentions, doubling(out) if i else None))

        self.norm_out = group_norm(width, self.groups, group_norm_eps)
        self.conv_out = Conv2d(width, self.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        keys: Tensor | None = None,
        added: Sequence[Tensor] = (),
        **condition: Tensor,
    ) -> Tensor:
        """x (N, C, image_size, image_size), t (N,) in timesteps, y int64 (N,) → (N, O, image_size, image_size).

        keys int64 (N,), a word of each image, say what to drop while training, where dropout is set; evaluation
        drops nothing. added: to what `encoded` gives, one each. condition: of further conditions, by the names of
        `conditions`. x may come in any float dtype; the answer is in the weights' dtype (autocast's, under autocast).
        Raises ValueError for training with dropout but without keys.
        """
        context = self.context(t, y, keys, condition)
        encoded = self.encoded(x, context)
        *skips, h = [h + more for h, more in zip(encoded, added, strict=True)] if added else encoded
        for level in self.up:
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = _attended(attention, self._run(block, torch.cat([h, skips.pop()], dim=1), context), context)
            if level.resample is not None:
                h = self._resampled(level.resample, h, context)
        return self.conv_out(F.silu(self.norm_out(h)))  # (N, O, H, W)

    def context(self, t: Tensor, y: Tensor | None, keys: Tensor | None, condition: dict[str, Tensor]) -> Context:
        """Of a forward; raises as that does."""
        if not (self.training and self.dropout):
            keys = None
        elif keys is None:
            raise ValueError("a UNet with dropout needs the dropout keys of its rows while it trains")
        c = self.t_embedder(t)  # (N, E)
        if self.num_classes:
            c = c + self.y_embedder(y)  # (N, E)
        told = None
        if condition or self.conditions:
            vectors, told = self.conditions(condition)
            c = c + vectors  # (N, E)
        return Context(c, keys, told)

    def encoded(self, x: Tensor, context: Context, hint: Tensor | None = None) -> list[Tensor]:
        """The way down: what the way up takes at its side, in the order of its making, and behind it the middle.

        hint: (N, width, H, W), added to what the first convolution gives.
        """
        h = self.conv_in(with_waves(x, self.fourier).to(self.conv_in.weight.dtype))  # (N, width, H, W)
        if hint is not None:
            h = h + hint
        found = [h]
        for level in self.down:
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = _attended(attention, self._run(block, h, context), context)
                found.append(h)
            if level.resample is not None:
                h = self._resampled(level.resample, h, context)
                found.append(h)
        h = _attended(self.middle_attention, self._run(self.middle1, h, context), context)
        return [*found, self._run(self.middle2, h, context)]

    def _run(self, block: nn.Module, h: Tensor, context: Context) -> Tensor:
        run = _recomputed if self.activation_checkpointing and self.training else _called
        return run(block, h, context.c, context.keys)

    def _resampled(self, between: nn.Module, h: Tensor, context: Context) -> Tensor:
        return self._run(between, h, context) if self.resblock_updown else between(h)

    @staticmethod
    def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """What the parameter called `name` begins as, float32 of the given shape: no other parameter matters.

        Zero on what ends each residual branch and on the output, so each block begins as its skip and the output as 0
        (Ho et al. 2020, appendix B, and its code); norms begin at 1, labels small, the rest by Glorot's law.
        """
        if name.startswith("conditions."):
            return ConditionNetworks.initial_value(name, shape, seed)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        if name.endswith((".conv2.weight", ".attn.proj.weight", ".cross.proj.weight")) or name == "conv_out.weight":
            return torch.zeros(shape)
        if name.startswith("y_embedder."):
            return normal(name, shape, seed, std=0.02)
        return xavier_uniform(name, shape, seed, fan_out=shape[0] * math.prod(shape[2:]))
