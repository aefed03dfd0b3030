"""The loss by noise level: which levels a batch's losses belong to, and what an importance distribution remembers."""

import torch
import torch.distributed as dist

from dtrain.checkpoint.format import Checkpoint
from dtrain.diffusion.times import LEVEL_BINS, SecondMoment, by_noise_level
from dtrain.training.reduction import StepSums


class StepLosses:
    """The per-image losses of this rank's rows in one step, micro-batch after micro-batch."""

    def __init__(self, process, device: torch.device):
        self._process = process
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._levels = torch.zeros(2 * LEVEL_BINS, dtype=torch.float64, device=device)
        self.sum = torch.zeros((), device=device)

    def add(self, part: dict[str, torch.Tensor], losses: torch.Tensor) -> None:
        """losses (n,) of the rows of `part`, as `process.losses` gave them."""
        losses = losses.detach()
        place = self._process.place(part["time"])
        weights = self._process.times.weights(place)  # now: `observe` changes them
        self._levels += torch.cat(by_noise_level(losses if weights is None else losses / weights, place))
        self._parts.append((part["k"], part["time"], losses))
        self.sum += losses.sum()

    def by_level(self) -> torch.Tensor:
        """float64 (2 · 8,): sums, then counts, of the unweighted losses in each eighth of the process."""
        return self._levels

    def observe(self, world_size: int) -> None:
        """Show an importance distribution the whole global batch in the order of k. Collective; else nothing."""
        if not isinstance(self._process.times, SecondMoment):
            return
        rows = torch.stack([torch.cat(column).double() for column in zip(*self._parts, strict=True)])  # (3, n)
        if world_size > 1:
            everyone = [torch.empty_like(rows) for _ in range(world_size)]
            dist.all_gather(everyone, rows)
            rows = torch.cat(everyone, dim=1)
        _, u, losses = rows[:, rows[0].argsort()]  # k is exact in float64 up to 2^53 images
        self._process.observe(u, losses)


def memory(process) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold of the process beside the model: float32 tensors, the same on every rank."""
    if not isinstance(process.times, SecondMoment):
        return {}
    return {f"times:{name}": value.float() for name, value in process.times.state().items()}


def remember(process, checkpoint: Checkpoint) -> None:
    """Put back what `memory` gave."""
    state = memory(process)
    if not state:
        return
    found = {n.removeprefix("times:"): torch.from_numpy(checkpoint.tensor(n)).view(v.shape) for n, v in state.items()}
    process.times.load_state(found)


def forget(process) -> None:
    """As if no step had been taken."""
    state = memory(process)
    if state:
        process.times.load_state({n.removeprefix("times:"): torch.zeros_like(value) for n, value in state.items()})


def mean_by_level(heard: list[StepSums]) -> dict[str, float]:
    """loss_level_0 (least noise) … loss_level_7 over the steps heard of; a level that had no row is left out."""
    sums = [sum(s.levels[i] for s in heard) for i in range(2 * LEVEL_BINS)]
    pairs = zip(sums[:LEVEL_BINS], sums[LEVEL_BINS:], strict=True)
    return {f"loss_level_{i}": total / count for i, (total, count) in enumerate(pairs) if count}
