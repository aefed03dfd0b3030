"""One small vector summed over the ranks each step, in the background, read one step later (design, decision 5).

Everything the ranks must agree on travels in it, so a step has no other collective of ours and never
waits for this one.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from dtrain.run import Position


@dataclass(frozen=True)
class StepSums:
    """What all ranks know of a step once it is reduced; equal on every rank."""

    position: Position  # after the step
    loss: float  # mean over the global batch
    grad_norm: float  # of the mean gradient, before clipping
    written: bool  # every rank has written its part of the checkpoint in flight
    failed: bool  # some rank could not


class StepReduction:
    def __init__(self, world_size: int, batch_size: int):
        self.world_size, self.batch_size = world_size, batch_size
        self._pending = None  # (position, vector, work)

    def start(self, position: Position, loss_sum: torch.Tensor, grad_norm, written: bool, failed: bool) -> None:
        """Begin the reduction of this step. `loss_sum` is the sum of this rank's per-image losses, a scalar tensor."""
        assert self._pending is None, "read the previous step first"
        flags = torch.tensor([float(written), float(failed)], dtype=torch.float64, device=loss_sum.device)
        norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=loss_sum.device).reshape(1)
        vector = torch.cat([loss_sum.detach().double().reshape(1), norm, flags])
        work = dist.all_reduce(vector, async_op=True) if self.world_size > 1 else None
        self._pending = (position, vector, work)

    def finish(self) -> StepSums | None:
        """The sums of the step begun last; None when there is none."""
        if self._pending is None:
            return None
        position, vector, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        loss, norm, written, failed = vector.tolist()
        return StepSums(
            position,
            loss=loss / self.batch_size,
            grad_norm=norm / self.world_size,
            written=round(written) == self.world_size,
            failed=failed > 0,
        )
