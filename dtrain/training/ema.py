"""Exponential moving averages of the weights, kept as optimizer state.

The optimizer holds fp32 master shards under ZeRO, so an average kept beside Adam's moments is fp32, sharded at every
stage and free of communication: 4·P/R bytes a profile (design, decision 3).
"""

from collections.abc import Callable

import torch

from dtrain.config import EMAProfile


def ema_keys(profiles: list[EMAProfile]) -> list[str]:
    """The optimizer-state keys of the profiles: ema_0, ema_1, …"""
    return [f"ema_{i}" for i in range(len(profiles))]


def attach(
    optimizer: torch.optim.Optimizer,
    profiles: list[EMAProfile],
    unless: Callable[[], bool],
    step_of: Callable[[str], int],
) -> None:
    """Move every average after every optimizer step: ema ← ema + w·(weight − ema) with the profile's w of that step,
    but not in a step that is refused (`unless` says so): there nothing moves.

    step_of: key of an average → the number of the step that is taken, counted from 1 where the average begins. The
    states must have been allocated. Stage 3 calls the optimizer once per sub-group, each time with that group's
    parameters only: nothing here counts calls. A parameter without a gradient is moved too, in the same call in which
    its group is stepped.
    """

    @torch.no_grad()
    def move(optimizer, *_):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        if not weights or unless():
            return
        for key, profile in zip(ema_keys(profiles), profiles, strict=True):
            averages = [optimizer.state[p][key] for p in weights]
            torch._foreach_lerp_(averages, [p.data for p in weights], profile.weight(step_of(key)))

    optimizer.register_step_post_hook(move)
