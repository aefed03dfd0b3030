"""A step that moves nothing: hooks take the gradients away before the optimizer sees them and put them back after.

AdamW passes over a parameter without a gradient: neither weight, moments, step count nor weight decay touch it. The
same at every ZeRO stage, and decided when the gradient's norm is known and nothing has moved yet. At stages 1 to 3
DeepSpeed does not even call the optimizer where the norm is not finite.
"""

from collections.abc import Callable

import torch


class Refusal:
    """norm: the gradient norm of the step being taken, equal on all ranks; asked once the optimizer is called."""

    def __init__(self, optimizer: torch.optim.Optimizer, norm: Callable[[], float]):
        self._norm = norm
        self._limit, self._refused = 0.0, None
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        optimizer.register_step_pre_hook(self._take)
        optimizer.register_step_post_hook(self._put_back)

    def begin(self, limit: float) -> None:
        """Before the next step, which is refused where its norm is over `limit`, infinite or not a number."""
        self._limit, self._refused = limit, None

    def refuses(self) -> bool:
        """Asked of a device once a step, however many sub-groups the optimizer is called for."""
        if self._refused is None:
            self._refused = not self._norm() <= self._limit
        return self._refused

    def _take(self, optimizer, *_) -> None:
        if self.refuses():
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                self._kept.append((p, p.grad))
                p.grad = None

    def _put_back(self, *_) -> None:
        for p, grad in self._kept:  # DeepSpeed uses some again
            p.grad = grad
        self._kept.clear()
