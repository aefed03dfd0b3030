"""At stage 3, weights are fetched and let go a block at a time: DeepSpeed's hooks stand on blocks, not on every layer.

A hook is a millisecond's worth of Python in every few; a DiT of 12 blocks has 180 layers and activations that would all
have some. DeepSpeed calls a module whose hooks stand for its children a leaf. It would also wait for a leaf's backward
to take the gradients of all its weights at once, with zeros for those that have none by then: wrong where a network is
called twice in a step, or in another player's turn. So gradients are taken as they come, a weight at a time.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from dtrain.models.compiled import BLOCKS
from dtrain.training.deepspeed_import import deepspeed


@contextmanager
def fetched_by_blocks(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Around `deepspeed.initialize` at stage 3."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    for network in networks:
        for module in network.modules():
            if isinstance(module, BLOCKS):
                deepspeed.utils.set_z3_leaf_module(module, True)
    hooks = DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks

    def hooks_of_each_weight(zero) -> None:
        for p in zero.module.parameters():
            if hasattr(p, "ds_z3_leaf_module"):
                del p.ds_z3_leaf_module
        hooks(zero)

    DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks = hooks_of_each_weight
    try:
        yield
    finally:
        DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks = hooks
