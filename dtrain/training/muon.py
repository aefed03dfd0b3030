"""Muon: matrices of transformer blocks move by their momentum, made orthogonal, all else by AdamW (Jordan et al. 2024).

    m ← β m + (1 − β) g,   u = β m + (1 − β) g,   W ← (1 − lr·decay) W − lr · 0.2 √max(rows, columns) · orthogonal(u)

With that factor an update is as large as AdamW's, and both take one learning rate (Liu et al. 2025). The momentum is
elementwise: it lies in the shards in the place of Adam's first moment, so checkpoints know nothing of it. A matrix is
put together from all ranks in each step, and each rank moves its own part. All of it happens once the gradient is
clipped and the step is not refused; DeepSpeed's own Muon does its part before that, when neither is known.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dtrain.config.training import Optim
from dtrain.training.zero_state import ZeroState

ITERATION = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: steepest at 0, and within about a third of 1 after five
STEPS = 5
TINY = 1e-7  # norms below count as this: what rounding alone leaves must not become a whole step
Named = list[tuple[str, nn.Parameter]]


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Muon moves this parameter."""
    return "blocks" in name.split(".") and len(shape) == 2


def split(
    optim: Optim, groups: Iterable[Named], factors: Iterable[float], shapes: dict[str, tuple[int, ...]]
) -> tuple[list[Named], list[float]]:
    """The groups of parameters, of Muon each in two, what AdamW moves and then the matrices; and their factors."""
    if optim.name == "adamw":
        return list(groups), list(factors)
    found = []
    for group, factor in zip(groups, factors, strict=True):
        for matrices in (False, True):
            part = [(name, p) for name, p in group if is_matrix(name, shapes[name]) == matrices]
            found += [(part, factor)] if part else []
    return [part for part, _ in found], [factor for _, factor in found]


def attach(optimizer: torch.optim.AdamW, state: ZeroState, optim: Optim, shapes: dict[str, tuple[int, ...]]) -> None:
    """Let hooks of AdamW move the matrices, and take their gradients away before AdamW sees them; after `Refusal`'s.

    A step that is refused has no gradients by then. A collective within the optimizer's step.
    """
    if optim.name == "adamw":
        return
    names = {id(p): name for name, p in state.trainable}
    parts = {one.name.removesuffix(":fp32"): one for one in state.pieces(whole=True) if one.name.endswith(":fp32")}
    kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def move(optimizer, *_) -> None:
        for group in optimizer.param_groups:
            for master in group["params"]:
                of = state.parameters_of(master)
                if master.grad is not None and is_matrix(name := names[id(of[0])], shapes[name]):
                    step(master, of, group["lr"])

    def step(master: Tensor, of: list[nn.Parameter], lr: float) -> None:
        own, grad = optimizer.state[master], master.grad
        own["exp_avg"].lerp_(grad, 1 - optim.momentum)
        torch.lerp(grad, own["exp_avg"], optim.momentum, out=own["exp_avg_sq"])  # else unused: 0 between steps
        master.mul_(1 - lr * optim.weight_decay)
        for p in of:
            shape = shapes[name := names[id(p)]]
            update = orthogonal(state.whole(p, "exp_avg_sq").view(shape)).flatten()
            if (part := parts.get(name)) is not None:
                size = 0.2 * math.sqrt(max(shape))
                part.values.add_(update[part.start : part.start + part.values.numel()], alpha=-lr * size)
        own["exp_avg_sq"].zero_()
        kept.append((master, grad))
        master.grad = None

    def put_back(*_) -> None:
        for master, grad in kept:
            master.grad = grad
        kept.clear()

    optimizer.register_step_pre_hook(move)
    optimizer.register_step_post_hook(put_back)


def orthogonal(x: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns to x (m, n): its singular values, over their norm,
    through STEPS odd polynomials of degree 5. In float32 or finer: bfloat16 makes a hundredth of a last bit.
    """
    a, b, c = ITERATION
    x = x.to(torch.promote_types(torch.float32, x.dtype))
    wide = x.mT if x.shape[0] > x.shape[1] else x
    wide = wide / wide.norm().clamp(min=TINY)
    for _ in range(STEPS):
        square = wide @ wide.mT
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide.mT if x.shape[0] > x.shape[1] else wide
