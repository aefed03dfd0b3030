"""DiT: a transformer over image patches, conditioned through adaptive layer norm (Peebles & Xie 2023).

Parameter names are those of the published checkpoints. The options of JiT (Li & He 2025) leave that architecture; what
they add is called as there. Shapes: N rows, T tokens, D width, C channels in,
O channels out, p patch side.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain.models.fourier import channels_with_waves, with_waves
from dtrain.models.layers import (
    Attention,
    BottleneckPatchEmbedder,
    ConditionNetworks,
    CrossAttention,
    LabelEmbedder,
    Linear,
    PatchEmbedder,
    TimestepEmbedder,
    Tokens,
    modulate,
    norm_of,
    normal,
    perceptron_of,
    positions,
    unpatchify,
    xavier_uniform,
)
from dtrain.models.rotary import rotations


class DiTBlock(nn.Module):
    """Attention and a perceptron, each normalised, modulated and gated by the condition (adaLN-Zero, figure 3).

    cross: between them, attention to the tokens of conditions (as in PixArt-α, Chen et al. 2023). norm, mlp: as of
    `layers.norm_of` and `layers.perceptron_of`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        cross: bool = False,
        norm: str = "layer",
        mlp: str = "gelu",
    ):
        super().__init__()
        self.norm1 = norm_of(norm, width)
        self.attn = Attention(width, heads, qk_norm)
        if cross:
            self.norm_cross = norm_of(norm, width)
            self.cross = CrossAttention(width, heads, width, qk_norm)
        self.norm2 = norm_of(norm, width)
        self.mlp = perceptron_of(mlp, width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, told: Tokens | None = None, rotation: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # (N, D) each
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rotation=rotation)  # (N, T, D)
        if told is not None:
            x = x + self.cross(self.norm_cross(x), *told)  # (N, T, D)
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, T, D)
        return x


class FinalLayer(nn.Module):
    """From a token to the pixels of its patch."""

    def __init__(self, width: int, pixels: int, norm: str = "layer"):
        super().__init__()
        self.norm_final = norm_of(norm, width)
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

    Further options of JiT: norm and mlp of `DiTBlock`; rotary: queries and keys are turned by their places, beside the
    positions that are added, as both are there; bottleneck: channels that a patch goes through, None: none;
    context_tokens: so many tokens made of the class stand in front of the picture's from block context_from on.
    fourier: octaves of the waves that it sees beside each channel (`fourier.with_waves`).
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
        norm: str = "layer",
        mlp: str = "gelu",
        rotary: bool = False,
        bottleneck: int | None = None,
        context_tokens: int = 0,
        context_from: int = 0,
        fourier: Sequence[int] = (),
    ):
        super().__init__()
        assert image_size % patch == width % heads == width % 4 == 0
        self.image_size = image_size
        self.channels = channels
        self.out_channels = 2 * channels if learn_sigma else channels
        self.patch = patch
        self.num_classes = num_classes
        self.activation_checkpointing = False  # recompute each block's activations in backward
        self.head = width // heads if rotary else None  # channels that are turned
        self.fourier = tuple(fourier)
        seen = channels_with_waves(channels, self.fourier)
        if bottleneck is None:
            self.x_embedder = PatchEmbedder(seen, patch, width)
        else:
            self.x_embedder = BottleneckPatchEmbedder(seen, patch, bottleneck, width)
        self.t_embedder = TimestepEmbedder(width, shift=frequency_shift)
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, width)
        self.condition_width = width
        self.conditions = ConditionNetworks()
        self.pos_embed = nn.Parameter(torch.empty(1, (image_size // patch) ** 2, width), requires_grad=False)
        self.context_tokens = context_tokens if context_from < depth else 0  # a copy's first half may end before
        self.context_from = context_from
        if self.context_tokens:
            assert num_classes
            self.in_context_posemb = nn.Parameter(torch.empty(1, context_tokens, width))
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio, qk_norm, cross, norm, mlp) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * self.out_channels, norm)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, added: Sequence[Tensor] = (), **condition: Tensor
    ) -> Tensor:
        """x (N, C, image_size, image_size), t (N,) in timesteps, y int64 (N,) → (N, O, image_size, image_size).

        added: (N, T, D) each, to the first blocks' outputs; there T counts the tokens of the class too. condition: of
        further conditions, by the names of `conditions`.
        x may come in any float dtype; the answer is in the weights' dtype (autocast's, under autocast).
        """
        x, c, told = self.embedded(x, t, y, condition)
        rotation = self.rotation(x)
        for number in range(len(self.blocks)):
            x = self.called(number, x, c, told, y, rotation)  # (N, T, D)
            if number < len(added):
                x = x + added[number]  # (N, T, D)
        if self.context_tokens:
            x = x[:, self.context_tokens :]  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p·p·O)
        return unpatchify(x, self.patch)  # (N, O, image_size, image_size)

    def embedded(
        self, x: Tensor, t: Tensor, y: Tensor | None, condition: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tokens | None]:
        """What the blocks take: the patches as tokens (N, T, D), time and vectors (N, D), tokens of conditions."""
        x = self.x_embedder(with_waves(x, self.fourier) if self.fourier else x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t)  # (N, D)
        if self.num_classes:
            c = c + self.y_embedder(y)  # (N, D)
        told = None
        if condition or self.conditions:
            vectors, told = self.conditions(condition)
            c = c + vectors  # (N, D)
        return x, c, told

    def rotation(self, x: Tensor) -> Tensor | None:
        """The rotations of the class's tokens and of the picture's x (N, T, D); None where nothing is turned."""
        return None if self.head is None else rotations(math.isqrt(x.shape[1]), self.head, self.context_tokens, x)

    def called(
        self, number: int, x: Tensor, c: Tensor, told: Tokens | None, y: Tensor | None, rotation: Tensor | None
    ) -> Tensor:
        """What block `number` makes of x (N, T, D); at context_from the class's tokens come in front of the others."""
        if self.context_tokens and number == self.context_from:
            x = torch.cat([self.y_embedder(y)[:, None] + self.in_context_posemb, x], dim=1)  # (N, T, D)
        block, turned = self.blocks[number], None if rotation is None else rotation[:, -x.shape[1] :]
        if self.activation_checkpointing and self.training:
            return checkpoint(block, x, c, told, turned, use_reentrant=False)  # (N, T, D)
        return block(x, c, told, turned)  # (N, T, D)

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
        if name.endswith(".weight") and len(shape) == 1:  # of a norm
            return torch.ones(shape)
        if (
            name.endswith((".bias", ".cross.proj.weight"))
            or "adaLN_modulation" in name
            or name.startswith("final_layer.linear")
        ):
            return torch.zeros(shape)
        if name.startswith(("t_embedder.", "y_embedder.", "in_context_posemb")):
            return normal(name, shape, seed, std=0.02)
        return xavier_uniform(name, shape, seed)
