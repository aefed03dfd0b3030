"""The parts backbones are made of, and how their weights begin.

Shapes: N rows, T tokens, D width, H heads, C channels.

Weights begin as a pure function of (seed, parameter name), never of construction order or of a global generator, so a
model that is built partitioned starts equal to one built whole. The layers here therefore only allocate; a backbone's
`initial_value(name, shape, seed)` says what each parameter begins as, and `initialize` writes them all.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.models.rotary import rotated
from dtrain.randomness import Draws, Purpose, key_of


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: `initialize` gives the values."""


class Conv2d(nn.Conv2d):
    def reset_parameters(self) -> None:
        """Nothing: `initialize` gives the values."""


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: `initialize` gives the values."""


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Write every parameter's initial value; parameters on the meta device, which hold none, stay as they are."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            parameter.copy_(model.initial_value(name, tuple(parameter.shape), seed))


def xavier_uniform(name: str, shape: tuple[int, ...], seed: int, fan_out: int | None = None) -> Tensor:
    """float32, uniform in ±√(6/(fan_in + fan_out)), the fans those of the weight flattened to (out, rest).

    A convolution whose windows overlap has a larger fan_out than that: out times the pixels of its window.
    """
    bound = math.sqrt(6 / ((fan_out or shape[0]) + math.prod(shape[1:])))
    uniform = Draws(seed).at(Purpose.INITIAL_WEIGHT, key_of(name)).random(shape, dtype=np.float32)
    return torch.from_numpy(uniform).mul_(2 * bound).sub_(bound)


def normal(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """float32, normal with mean 0 and the given standard deviation."""
    return torch.from_numpy(Draws(seed).normal(Purpose.INITIAL_WEIGHT, key_of(name), shape)).mul_(std)


def timestep_embedding(t: Tensor, size: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """cos(t ω_i), then sin(t ω_i), with ω_i = 10000^(−i/(size/2 − shift)), of t (N,): (N, size).

    Published DiT weights have a shift of 0, diffusers' DiT one of 1.

    Computed in at least float32 and only then rounded to `dtype`: as bfloat16, t = 999 is 1000.
    """
    exact = torch.promote_types(torch.float32, dtype)
    phase = t.to(exact)[:, None] * time_frequencies(size, exact, shift, t.device)  # (N, size/2)
    return torch.cat([phase.cos(), phase.sin()], dim=1).to(dtype)  # (N, size)


def time_frequencies(size: int, dtype: torch.dtype, shift: int = 0, device: torch.device | None = None) -> Tensor:
    """ω_i of `timestep_embedding`, (size/2,)."""
    i = torch.arange(size // 2, dtype=dtype, device=device)
    return torch.exp(-math.log(10000) / (size // 2 - shift) * i)


class TimestepEmbedder(nn.Module):
    """A timestep as a vector: sines and cosines, `frequencies` of them together, through a two-layer perceptron."""

    def __init__(self, width: int, frequencies: int = 256, shift: int = 0):
        super().__init__()
        self.frequencies, self.shift = frequencies, shift
        self.mlp = nn.Sequential(Linear(frequencies, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        waves = timestep_embedding(t, self.frequencies, self.mlp[0].weight.dtype, self.shift)  # (N, frequencies)
        return self.mlp(waves)  # (N, D)


class SpanEmbedder(TimestepEmbedder):
    """Two times (N, 2), t and the span to an earlier one, as one vector: the sum of both."""

    def __init__(self, width: int, frequencies: int = 256, shift: int = 0):
        super().__init__(width, frequencies, shift)
        self.span = TimestepEmbedder(width, frequencies, shift)

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(t[:, 0]) + self.span(t[:, 1])  # (N, D)


class LatentEmbedder(TimestepEmbedder):
    """A timestep and `latent` numbers (N, 1 + latent) as one vector: the sum of the time's and of a perceptron's."""

    def __init__(self, width: int, latent: int, frequencies: int = 256, shift: int = 0):
        super().__init__(width, frequencies, shift)
        self.latent = nn.Sequential(Linear(latent, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(t[:, 0]) + self.latent(t[:, 1:].to(self.latent[0].weight.dtype))  # (N, D)


class LabelEmbedder(nn.Module):
    """A class as a vector; the row after the classes is the null label, which stands for "no class"."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)  # (N, D)


class Tokens(NamedTuple):
    """What a network attends to: values (N, L, D), and mask bool (N, L), which of them there are, one a row or more."""

    values: Tensor
    mask: Tensor


class TokenNetwork(nn.Module):
    """A condition's network that makes tokens of its argument `NAME` and of `NAME_mask`, bool (N, L): `Tokens`."""


class ConditionNetworks(nn.ModuleDict):
    """Networks of the conditions beside the class, by the names of their arguments: each makes a vector, or tokens."""

    def forward(self, condition: dict[str, Tensor]) -> tuple[Tensor | float, Tokens | None]:
        """The sum of the vectors (N, D), 0 of none; all tokens one behind the other, None of no network that makes any.

        Raises TypeError for a condition without a network.
        """
        telling = {name for name, network in self.items() if isinstance(network, TokenNetwork)}
        if condition.keys() != self.keys() | {f"{name}_mask" for name in telling}:
            raise TypeError(
                f"the network is told {', '.join(condition)}, and has networks for {', '.join(self) or 'nothing'}"
            )
        vectors = sum(network(condition[name]) for name, network in self.items() if name not in telling)
        told = [self[name](condition[name], condition[f"{name}_mask"]) for name in self if name in telling]
        if not told:
            return vectors, None
        return vectors, Tokens(torch.cat([one.values for one in told], 1), torch.cat([one.mask for one in told], 1))

    @staticmethod
    def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Biases begin at 0, norms at 1, the rest small; layers that make tokens of words by Glorot's law."""
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if ".words." in name and len(shape) > 1:
            inputs = ".embedding." in name or name.endswith(".positions")
            return normal(name, shape, seed, std=0.5) if inputs else xavier_uniform(name, shape, seed)
        return torch.ones(shape) if len(shape) == 1 else normal(name, shape, seed, std=0.02)


class PatchEmbedder(nn.Module):
    """Each patch × patch square of the image as a token, row by row."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x.to(self.proj.weight.dtype))  # (N, D, rows, columns)
        return x.flatten(2).transpose(1, 2)  # (N, T, D)


class BottleneckPatchEmbedder(nn.Module):
    """The same through fewer channels: of a large patch of pixels few directions hold pictures (Li & He 2025)."""

    def __init__(self, channels: int, patch: int, bottleneck: int, width: int):
        super().__init__()
        self.proj1 = Conv2d(channels, bottleneck, kernel_size=patch, stride=patch, bias=False)
        self.proj2 = Conv2d(bottleneck, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj2(self.proj1(x.to(self.proj1.weight.dtype)))  # (N, D, rows, columns)
        return x.flatten(2).transpose(1, 2)  # (N, T, D)


def norm_of(kind: str, width: int) -> nn.Module:
    """kind: layer, without parameters, or rms, which has a scale for each channel (Zhang & Sennrich 2019)."""
    if kind == "rms":
        return nn.RMSNorm(width, eps=1e-6)
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017).

    qk_norm: queries and keys of each head are RMS-normalised, so that no logit can grow without bound (Dehghani et al.
    2023).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
        """x (N, T, D) → (N, T, D). mask: bool (N, T), which tokens are attended to; None: all.

        rotation: `rotary.rotations` of the tokens; None: queries and keys are not turned.
        """
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (N, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, H, T, D/H) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        attended = None if mask is None else mask[:, None, None]
        x = F.scaled_dot_product_attention(q, k, v, attended)  # (N, H, T, D/H)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


class CrossAttention(nn.Module):
    """Multi-head attention of a picture's tokens to those of a condition (Vaswani et al. 2017); its output begins at 0.

    qk_norm: as of `Attention`.
    """

    def __init__(self, width: int, heads: int, told: int, qk_norm: bool = False):
        """told: channels of the condition's tokens."""
        super().__init__()
        self.heads = heads
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.q = Linear(width, width)
        self.kv = Linear(told, 2 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, told: Tensor, mask: Tensor) -> Tensor:
        """x (N, T, D), told (N, L, E), mask bool (N, L), of which no row is all False → (N, T, D)."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, H, T, D/H)
        k, v = self.kv(told).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, H, L, D/H) each
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, mask[:, None, None])  # (N, H, T, D/H)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


class MLP(nn.Module):
    """Two layers with a tanh-approximated GELU between, as published DiT weights were trained with."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x), approximate="tanh")  # (N, T, hidden)
        return self.fc2(x)  # (N, T, D)


class SwiGLU(nn.Module):
    """Two layers between which one half of the channels gates the other (Shazeer 2020); the names are JiT's."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)  # (N, T, hidden) each
        return self.w3(F.silu(gate) * value)  # (N, T, D)


def perceptron_of(kind: str, width: int, hidden: int) -> nn.Module:
    """kind: gelu, or swiglu of two thirds of the hidden channels, with as many parameters."""
    return SwiGLU(width, 2 * hidden // 3) if kind == "swiglu" else MLP(width, hidden)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """Square images of tokens that lie row by row: (N, T, p·p·O) → (N, O, √T·p, √T·p)."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(2, (patch, patch, -1))  # (N, T, p, p, O)
    x = x.unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4)  # (N, O, side, p, side, p)
    return x.reshape(*x.shape[:2], side * patch, side * patch)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) scaled by 1 + scale and shifted, both (N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]  # (N, T, D)


def positions(side: int, width: int) -> Tensor:
    """2-D sine-cosine positions of a side × side grid of tokens, row by row: float32 (1, side², width).

    The first half of the width encodes the column and the second the row; each half is sin, then cos, of the
    coordinate times 10000^(−i/(width/4)). Computed in float64.
    """
    i = torch.arange(width // 4, dtype=torch.float64, device="cpu")
    phase = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * 10000 ** (-i / (width // 4))
    axis = torch.cat([phase.sin(), phase.cos()], dim=1)  # (side, D/2)
    column = axis[None].expand(side, -1, -1)  # (row, column, D/2)
    row = axis[:, None].expand(-1, side, -1)  # (row, column, D/2)
    return torch.cat([column, row], dim=2).reshape(1, side**2, width).float()  # (1, T, D)
