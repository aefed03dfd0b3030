"""The loss by noise level, and a step's losses for an objective that observes them."""

import torch
import torch.distributed as dist

from dtrain.batch import Batch
from dtrain.diffusion.times import LEVEL_BINS, by_noise_level
from dtrain.objectives.objective import Losses, Objective
from dtrain.training.reduction import StepSums


class StepLosses:
    """The per-image losses of this rank's rows in one step, micro-batch after micro-batch."""

    def __init__(self, objective: Objective, device: torch.device):
        self._objective = objective
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._first = next(iter(objective.turns))
        self._levels = torch.zeros(2 * LEVEL_BINS, dtype=torch.float64, device=device)
        self.sum = torch.zeros((), device=device)
        self.named: dict[str, tuple[torch.Tensor, torch.Tensor | int]] = {}  # (sum, count) of what else is reported
        # (sum, rows) of what the objective is to have of all ranks
        self.vectors: dict[str, tuple[torch.Tensor, int]] = {}

    def add(self, turn: str, part: Batch, losses: Losses) -> None:
        """The losses of the rows of `part` in the turn of this name, as `objective.losses` gave them."""
        rows = losses.rows.detach()
        for name, (total, count) in losses.parts.items():
            self._count(name, total.detach(), count)
        for name, total in losses.sums.items():
            before, number = self.vectors.get(name, (0.0, 0))
            self.vectors[name] = before + total.detach().double(), number + len(rows)
        if turn != self._first:
            self._count(f"loss_{turn}", rows.sum(), len(rows))
            return
        if losses.place is not None:
            shown = self._objective.unweighted(rows, losses.place) if losses.by_level is None else losses.by_level
            self._levels += torch.cat(by_noise_level(shown, losses.place))
        if self._objective.observes:
            self._parts.append((part["k"], part["time"], rows))
        self.sum += rows.sum()

    def _count(self, name: str, total: torch.Tensor, count: torch.Tensor | int) -> None:
        before, number = self.named.get(name, (0.0, 0))
        self.named[name] = (before + total, number + count)

    def by_level(self) -> torch.Tensor:
        """float64 (2 · 8,): sums, then counts, of the unweighted losses in each eighth of the process."""
        return self._levels

    def observe(self, world_size: int) -> None:
        """Show the objective the whole global batch in the order of k. Collective, where it observes; else nothing."""
        if not self._objective.observes:
            return
        rows = torch.stack([torch.cat(column).double() for column in zip(*self._parts, strict=True)])  # (3, n)
        if world_size > 1:
            everyone = [torch.empty_like(rows) for _ in range(world_size)]
            dist.all_gather(everyone, rows)
            rows = torch.cat(everyone, dim=1)
        _, u, losses = rows[:, rows[0].argsort()]  # k is exact in float64 up to 2^53 images
        self._objective.observe(u, losses)


def named_sums(objective: Objective) -> list[str]:
    """Names of what the steps of an objective report beside the first turn's loss and norm."""
    _, *further = objective.turns
    return [*(f"{what}_{turn}" for turn in further for what in ("loss", "grad_norm")), *objective.parts]


def further_norms(norms: dict[str, float]) -> dict[str, tuple[float, int]]:
    """The norms of the turns after the first, as (sum, count): the same on every rank."""
    return {f"grad_norm_{turn}": (norm, 1) for turn, norm in list(norms.items())[1:]}


def mean_by_level(reduced: list[StepSums]) -> dict[str, float]:
    """loss_level_0 (least noise) … loss_level_7 over these steps; a level that had no row is left out."""
    sums = [sum(s.levels[i] for s in reduced) for i in range(2 * LEVEL_BINS)]
    pairs = zip(sums[:LEVEL_BINS], sums[LEVEL_BINS:], strict=True)
    return {f"loss_level_{i}": total / count for i, (total, count) in enumerate(pairs) if count}
