"""MMDiT: a transformer over the tokens of the image and of the text, as in Stable Diffusion 3 (Esser et al. 2024).

Shapes: N rows, T tokens of the image, L of the text, D width, H heads, C channels in, O channels out, p patch side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain.models.dit import DiT, FinalLayer
from dtrain.models.layers import (
    MLP,
    ConditionNetworks,
    LabelEmbedder,
    Linear,
    PatchEmbedder,
    TimestepEmbedder,
    Tokens,
    modulate,
    normal,
    unpatchify,
)


class Stream(nn.Module):
    """One stream's own weights in a block; those of attention and of a perceptron are gated as in `DiTBlock`.

    last: no block comes after that reads what the stream becomes, so it only gives keys and values.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, last: bool = False):
        super().__init__()
        self.heads, self.last = heads, last
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        if last:
            self.kv = Linear(width, 2 * width)
        else:
            self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
            self.qkv = Linear(width, 3 * width)
            self.proj = Linear(width, width)
            self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.mlp = MLP(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, (2 if last else 6) * width))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """shift, scale, gate of attention, then of the perceptron, (N, D) each; of a last stream the first two."""
        return self.adaLN_modulation(c).chunk(2 if self.last else 6, dim=1)

    def heads_of(self, x: Tensor, shift: Tensor, scale: Tensor) -> list[Tensor]:
        """x (N, T, D) → queries, keys and values (N, H, T, D/H) each; of a last stream keys and values."""
        project = self.kv if self.last else self.qkv
        parts = project(modulate(self.norm1(x), shift, scale)).unflatten(2, (-1, self.heads, x.shape[2] // self.heads))
        *q, k, v = parts.permute(2, 0, 3, 1, 4)  # (N, H, T, D/H) each
        return [*(self.q_norm(one) for one in q), self.k_norm(k), v]

    def updated(self, x: Tensor, attended: Tensor, gate1: Tensor, shift2: Tensor, scale2: Tensor, gate2: Tensor):
        """x (N, T, D) with what its tokens attended to, (N, T, D), and then the perceptron: (N, T, D)."""
        x = x + gate1[:, None] * self.proj(attended)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class MMDiTBlock(nn.Module):
    """One attention over both streams' tokens, to those of the image and of the text that there are (figure 2b).

    Queries and keys of each head are RMS-normalised. last: the text is attended to, and does not go on.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, last: bool = False):
        super().__init__()
        self.image = Stream(width, heads, mlp_ratio)
        self.text = Stream(width, heads, mlp_ratio, last)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T, D), text (N, L, D), mask bool (N, L), which of it there is, c (N, D) → x and text."""
        shift, scale, *of_image = self.image.modulation(c)  # (N, D) each
        text_shift, text_scale, *of_text = self.text.modulation(c)  # (N, D) each
        q, k, v = self.image.heads_of(x, shift, scale)  # (N, H, T, D/H) each
        *text_q, text_k, text_v = self.text.heads_of(text, text_shift, text_scale)  # (N, H, L, D/H) each
        q = torch.cat([q, *text_q], dim=2)  # (N, H, T + L, D/H), or of the last block (N, H, T, D/H)
        k, v = torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2)  # (N, H, T + L, D/H) each
        there = F.pad(mask, (x.shape[1], 0), value=True)[:, None, None]  # (N, 1, 1, T + L)
        attended = F.scaled_dot_product_attention(q, k, v, there).transpose(1, 2).flatten(2)  # (N, T + L or T, D)
        if not self.text.last:
            text = self.text.updated(text, attended[:, x.shape[1] :], *of_text)  # (N, L, D)
        return self.image.updated(x, attended[:, : x.shape[1]], *of_image), text


class MMDiT(nn.Module):
    """ε_θ(x_t, t, y, text) for square images of any size that `patch` divides.

    The constructor only allocates; `layers.initialize` gives the weights (`models.build.build` does both). At least
    one network of `conditions` makes tokens: those of all of them, one behind the other, are the second stream. The
    masked mean of them also goes into the modulation, beside t, the class and what else makes a vector. With
    num_classes > 0 labels run from 0 to num_classes, and num_classes itself is the null label. learn_sigma doubles the
    output channels: the second half describes the variance.
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
        self.t_embedder = TimestepEmbedder(width)
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, width)
        self.condition_width = width
        self.conditions = ConditionNetworks()
        self.pooled_embedder = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.pos_embed = nn.Parameter(torch.empty(1, (image_size // patch) ** 2, width), requires_grad=False)
        self.blocks = nn.ModuleList(MMDiTBlock(width, heads, mlp_ratio, i + 1 == depth) for i in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **condition: Tensor) -> Tensor:
        """x (N, C, image_size, image_size), t (N,) in timesteps, y int64 (N,) → (N, O, image_size, image_size).

        condition: of further conditions, by the names of `conditions`.
        x may come in any float dtype; the answer is in the weights' dtype (autocast's, under autocast).
        """
        vectors, told = self.conditions(condition)
        text, mask = told  # (N, L, D), (N, L)
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + vectors + self.pooled_embedder(masked_mean(told))  # (N, D)
        if self.num_classes:
            c = c + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x, text = checkpoint(block, x, text, mask, c, use_reentrant=False)  # (N, T, D), (N, L, D)
            else:
                x, text = block(x, text, mask, c)  # (N, T, D), (N, L, D)
        x = self.final_layer(x, c)  # (N, T, p·p·O)
        return unpatchify(x, self.patch)  # (N, O, image_size, image_size)

    @staticmethod
    def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """What the parameter called `name` begins as, float32 of the given shape: no other parameter matters.

        As a DiT's: zero on every adaLN and the output layer, so each block begins as the identity of both streams and
        the output as 0.
        """
        if name.startswith("pooled_embedder.") and name.endswith(".weight"):
            return normal(name, shape, seed, std=0.02)
        return DiT.initial_value(name, shape, seed)


def masked_mean(told: Tokens) -> Tensor:
    """The mean of the tokens that there are, (N, D); no row is without any."""
    kept = told.mask[..., None]
    return told.values.masked_fill(~kept, 0).sum(1) / kept.sum(1)
