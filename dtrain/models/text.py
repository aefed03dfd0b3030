"""From what a text condition tells to tokens that a backbone attends to.

Shapes: N rows, L tokens, E channels of the encoder, D of the backbone.
"""

import torch
from torch import Tensor, nn

from dtrain.models.layers import MLP, Attention, Embedding, Linear, TokenNetwork, Tokens

HEAD_WIDTH = 32
WINDOW = 7  # bytes that the convolution sees


class Conv1d(nn.Conv1d):
    def reset_parameters(self) -> None:
        """Nothing: `layers.initialize` gives the values."""


class EncoderBlock(nn.Module):
    """Attention among the tokens that there are, and a perceptron, each behind its norm and added."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, width // HEAD_WIDTH)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)  # (N, L, E)
        return x + self.mlp(self.norm2(x))  # (N, L, E)


class TokenEncoder(nn.Module):
    """A small transformer over token numbers, trained with the backbone: where no published encoder is at hand.

    A convolution before it brings the bytes of a word together, which attention alone is slow to learn.
    """

    def __init__(self, vocabulary: int, length: int, width: int, depth: int):
        super().__init__()
        self.embedding = Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        self.local = Conv1d(width, width, WINDOW, padding=WINDOW // 2)
        self.blocks = nn.ModuleList(EncoderBlock(width) for _ in range(depth))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens int64 (N, L), mask bool (N, L), of which no row is all False → (N, L, E)."""
        x = (self.embedding(tokens) + self.positions).masked_fill(~mask[..., None], 0)  # (N, L, E)
        x = x + self.local(x.transpose(1, 2)).transpose(1, 2)  # (N, L, E)
        for block in self.blocks:
            x = block(x, mask)
        return x


class TextNetwork(TokenNetwork):
    """An encoder's tokens, or a trained encoder's of its own, in the width of the backbone and of unit variance.

    A row whose mask is all False is told nothing: instead of it stands one token, the null, which is learned or zero.
    """

    def __init__(self, encoder: TokenEncoder | None, width: int, out: int, learned_null: bool):
        """width: E, out: D. encoder: None where the tokens come encoded, (N, L, E), from one that is frozen."""
        super().__init__()
        if learned_null:
            self.null = nn.Parameter(torch.empty(1, width))
        own = {} if encoder is None else {"encoder": encoder}
        self.words = nn.ModuleDict(own | {"proj": Linear(width, out), "norm": nn.LayerNorm(out)})

    def forward(self, told: Tensor, mask: Tensor) -> Tokens:
        """told: token numbers int64 (N, L), or encoded tokens (N, L, E); mask bool (N, L)."""
        nothing = ~mask.any(1, keepdim=True)  # (N, 1)
        first = torch.arange(mask.shape[1], device=mask.device) == 0  # (L,)
        kept = mask | (nothing & first)  # (N, L)
        dtype = self.words["proj"].weight.dtype
        x = self.words["encoder"](told, kept) if "encoder" in self.words else told.to(dtype)  # (N, L, E)
        x = x.masked_fill(~mask[..., None], 0)  # padding is nothing, whatever stands there
        if hasattr(self, "null"):
            x = torch.where((nothing & first)[..., None], self.null.to(x.dtype), x)
        return Tokens(self.words["norm"](self.words["proj"](x)), kept)  # (N, L, D)
