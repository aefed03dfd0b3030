"""Compiling a network block by block, in place."""

from collections.abc import Iterable

from torch import nn

from dtrain.models.dit import DiTBlock
from dtrain.models.mmdit import MMDiTBlock
from dtrain.models.unet import AttentionBlock, ResidualBlock

BLOCKS = (DiTBlock, MMDiTBlock, ResidualBlock, AttentionBlock)
SHAPES = 64  # of a kind of block; a UNet of six levels has some thirty


def compile_blocks(networks: Iterable[nn.Module], **how) -> None:
    """Let each transformer and residual block be compiled at its first call, where it stands.

    No name changes, and so no key of a state: the block's call is replaced, not the block. Blocks of the same shape
    share what was compiled, and a block whose activations are recomputed is computed twice by the same code. Shapes
    are compiled as they are: what varies between blocks does not vary between steps. how: of `torch.compile`.
    """
    import torch._dynamo

    # It counts compilations by the code, which all blocks of a kind share, and past the limit would go on uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    for network in networks:
        for block in network.modules():
            if isinstance(block, BLOCKS):
                block.compile(dynamic=False, **how)
