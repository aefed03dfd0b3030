"""The gradient's norm: measured block by block, read once, and clipped by only where it clips.

DeepSpeed asks twice whether it is finite, and whoever judges the step once more; each would wait for the device again,
the last for the whole optimizer. So what DeepSpeed's functions give is on the host already: it clips by it as well, as
a tensor without dimensions may be on the CPU whatever it multiplies.
"""

from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain import distributed

BLOCK = 2**16  # elements; in float64 they stay in a core's cache


def clip_at_0(parameters: list[nn.Parameter], limit: float) -> float:
    """At stage 0, where DeepSpeed does not: the norm over all, by which gradients over the limit are clipped.

    Ranks hold the same gradients but may round differently where their devices differ: they take the largest norm.
    """
    own = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    largest = torch.where(own.isfinite(), own, torch.inf)
    if distributed.world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    norm = largest.item()
    if not 1.00001 * (norm + 2e-6) < limit:  # near the limit PyTorch's own rounding says whether it is over
        nn.utils.clip_grads_with_norm_(parameters, limit, own)
    return norm


def own_ways(zero, stage: int) -> None:
    """Let `zero`, DeepSpeed's optimizer of stage 1, 2 or 3, do all of the following that holds there."""
    read_once(zero, stage)
    clip_where_needed(zero)
    if stage != 3 and distributed.device().type == "cpu":
        measure_in_blocks(zero)


def read_once(zero, stage: int) -> None:
    """Let the norm be a tensor of the CPU, and so all that is made of it.

    The values are the device's own, bit for bit. Only this instance is changed.
    """
    if stage == 3:
        of_groups = zero._get_norm_groups
        zero._get_norm_groups = lambda: list(_on_host(torch.stack(of_groups())))  # one read, however many groups
    else:
        whole = zero.scaled_global_norm
        zero.scaled_global_norm = lambda norm_type=2: _on_host(whole(norm_type))


def clip_where_needed(zero) -> None:
    """Let `zero` leave gradients that are within the limit alone: it multiplies all by 1 there. After `read_once`."""
    clip = zero.unscale_and_clip_grads

    def unscale_and_clip_grads(gradients, norm: Tensor) -> None:
        # As DeepSpeed computes it, so that both say the same of the last bit; a norm that is no number is its affair.
        if zero.loss_scale != 1 or not (norm + 1e-6) / zero.clip_grad <= 1:
            clip(gradients, norm)

    zero.unscale_and_clip_grads = unscale_and_clip_grads


def measure_in_blocks(zero) -> None:
    """On a CPU at stages 1 and 2, let `zero` sum squares in float64 block by block; it copies each gradient to float64.

    The sum is rounded to float32 as before, which hides that its order is another. At stage 3 nothing rounds it. With
    offload DeepSpeed measures each gradient as it leaves.
    """
    zero.get_grad_norm_direct = partial(_norm_of_group, zero)


def _norm_of_group(zero, gradients: Iterable[Tensor], params, norm_type: float = 2.0) -> Tensor:
    """The norm of a parameter group over all ranks; −1 where it is not finite, as DeepSpeed marks it."""
    assert norm_type == 2
    total = sum_of_squares(g for g in gradients if not getattr(g, "_zero_padding", False)).float()
    dist.all_reduce(total, group=zero.dp_process_group)
    return torch.where(total.isfinite(), total.sqrt(), -1.0)


def sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all elements, float64, without a dimension."""
    buffer = torch.empty(BLOCK, dtype=torch.float64)
    sums = [torch.zeros((), dtype=torch.float64)]
    for tensor in tensors:
        for block in tensor.detach().reshape(-1).split(BLOCK):
            copy = buffer[: block.numel()].copy_(block)
            sums.append(copy.dot(copy))
    return torch.stack(sums).sum()


def _on_host(norm: Tensor) -> Tensor:
    return norm.to("cpu", copy=True)  # a copy on a CPU too, so that a test can count them
