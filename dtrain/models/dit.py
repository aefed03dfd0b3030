"""DiT: a transformer over image patches, conditioned through adaptive layer norm (Peebles & Xie 2023).

Parameter names are those of the published checkpoints. Shapes: N rows, T tokens, D width, C channels in,
O channels out, p patch side.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain.models.layers import (
    MLP,
    Attention,
    ConditionNetworks,
    CrossAttention,
    LabelEmbedder,
    Linear,
    PatchEmbedder,
    TimestepEmbedder,
    Tokens,
    modulate,
    normal,
    positions,
    unpatchify,
    xavier_uniform,
)


class DiTBlock(nn.Module):
    """Attention and a perceptron, each normalised, modulated and gated by the condition (adaLN-Zero, figure 3).

    cross: between them, attention to the tokens of conditions (as in PixArt-α, Chen et al. 2023).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, cross: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        if cross:
            self.norm_cross = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.cross = CrossAttention(width, heads, width, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, told: Tokens | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # (N, D) each
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))  # (N, T, D)
        if told is not None:
            x = x + self.cross(self.norm_cross(x), *told)  # (N, T, D)
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, T, D)
        return x


class FinalLayer(nn.Module):
    """From a token to the pixels of its patch."""

    def __init__(self, width: int, pixels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(width, pixels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # (N, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p·p·O)


class DiT(nn.Module):
    """ε_θ(x_t, t, y) for square images of any size that `patch` divides.

    The constructor only allocates; `layers.initialize` gives the weights (`models.build.build` does both). With
    num_classes > 0 labels run from 0 to num_classes, and num_classes itself is the null label; with num_classes = 0
    the model is unconditional and ignores them. learn_sigma doubles the output channels: the second half describes
    the variance. qk_norm and a frequency_shift of 1 (diffusers' spacing of the time frequencies) leave the published
    architecture. cross: each block attends to the tokens of `conditions`, of which one at least makes some.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        num_classes: int,
        mlp_ratio: float = 4,
        learn_sigma: bool = False,
        qk_norm: bool = False,
        frequency_shift: int = 0,
        cross: bool = False,
    ):
        super().__init__()
        assert image_size % patch == width % heads == width % 4 == 0
        self.image_size = image_size
        self.channels = channels
        self.out_channels = 2 * channels if learn_sigma else channels
        self.patch = patch
        self.num_classes = num_classes
        self.activation_checkpointing = False  # recompute each block's activations in backward
        self.x_embedder = PatchEmbedder(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width, shift=frequency_shift)
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, width)
        self.condition_width = width
        self.conditions = ConditionNetworks()
        self.pos_embed = nn.Parameter(torch.empty(1, (image_size // patch) ** 2, width), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio, qk_norm, cross) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * self.out_channels)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, added: Sequence[Tensor] = (), **condition: Tensor
    ) -> Tensor:
        """x (N, C, image_size, image_size), t (N,) in timesteps, y int64 (N,) → (N, O, image_size, image_size).

        added: (N, T, D) each, to the first blocks' outputs. condition: of further conditions, by the names of
        `conditions`.
        x may come in any float dtype; the answer is in the weights' dtype (autocast's, under autocast).
        """
        x, c, told = self.embedded(x, t, y, condition)
        for number, block in enumerate(self.blocks):
            x = self.called(block, x, c, told)  # (N, T, D)
            if number < len(added):
                x = x + added[number]  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p·p·O)
        return unpatchify(x, self.patch)  # (N, O, image_size, image_size)

    def embedded(
        self, x: Tensor, t: Tensor, y: Tensor | None, condition: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tokens | None]:
        """What the blocks take: the patches as tokens (N, T, D), time and vectors (N, D), tokens of conditions."""
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t)  # (N, D)
        if self.num_classes:
            c = c + self.y_embedder(y)  # (N, D)
        told = None
        if condition or self.conditions:
            vectors, told = self.conditions(condition)
            c = c + vectors  # (N, D)
        return x, c, told

    def called(self, block: nn.Module, x: Tensor, c: Tensor, told: Tokens | None) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(block, x, c, told, use_reentrant=False)  # (N, T, D)
        return block(x, c, told)  # (N, T, D)

    @staticmethod
    def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """What the parameter called `name` begins as, float32 of the given shape: no other parameter matters.

        Zero on every adaLN, cross-attention's output and the output layer, so each block begins as the identity and the
        output as 0.
        """
        if name.startswith("conditions."):
            return ConditionNetworks.initial_value(name, shape, seed)
        if name == "pos_embed":
            return positions(math.isqrt(shape[1]), shape[2])
        if name.endswith((".q_norm.weight", ".k_norm.weight")):
            return torch.ones(shape)
        if (
            name.endswith((".bias", ".cross.proj.weight"))
            or "adaLN_modulation" in name
            or name.startswith("final_layer.linear")
        ):
            return torch.zeros(shape)
        if name.startswith(("t_embedder.", "y_embedder.")):
            return normal(name, shape, seed, std=0.02)
        return xavier_uniform(name, shape, seed)
