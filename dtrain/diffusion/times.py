"""Which noise levels training visits: monotone maps of a uniform u in [0, 1) to a place in [0, 1) of the process.

A place of 0 is clean data and 1 is noise; the discrete process takes timestep ⌊place·T⌋, a flow takes the place itself.
Every map composes with stratified u. `weights` corrects for the map where the loss must keep its expectation.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dtrain.randomness import LARGEST

LEVEL_BINS = 8


@dataclass(frozen=True)
class Uniform:
    """Every level equally often."""

    def place(self, u: Tensor) -> Tensor:
        return u

    def weights(self, place: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class LogitNormal:
    """logit(place) ~ N(mean, std²): more of the middle (Esser et al. 2024, section 3.1). A reweighting on purpose."""

    mean: float = 0.0
    std: float = 1.0

    def place(self, u: Tensor) -> Tensor:
        normal = torch.special.ndtri(u.double())
        return torch.sigmoid(self.mean + self.std * normal).clamp(max=LARGEST)

    def weights(self, place: Tensor) -> Tensor | None:
        return None


UNIFORM = Uniform()


@dataclass(eq=False)
class SecondMoment:
    """p_t ∝ √E[L_t²] from the last ten losses of each timestep, uniform until all have ten.

    Nichol & Dhariwal 2021, section 3.3. The one time distribution with a memory: it is no function of
    (seed, k), so `history` and `counts` belong into the checkpoint. Every rank must observe the rows of the whole
    global batch in the order of k: then the memory is the same on all ranks and at any world size, up to the rounding
    of the losses themselves.
    """

    timesteps: int
    history: Tensor = field(init=False)  # float32 (T, 10), oldest first; places not yet filled hold 0
    counts: Tensor = field(init=False)  # int64 (T,), at most 10

    KEPT = 10
    UNIFORM_SHARE = 0.001  # of p_t, so that no weight explodes

    def __post_init__(self):
        self.history = torch.zeros(self.timesteps, self.KEPT)
        self.counts = torch.zeros(self.timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """p_t, float64 (T,)."""
        uniform = torch.full((self.timesteps,), 1 / self.timesteps, dtype=torch.float64)
        if not bool((self.counts == self.KEPT).all()):
            return uniform
        root = self.history.double().square().mean(1).sqrt()
        if not bool(root.sum() > 0):
            return uniform
        return (1 - self.UNIFORM_SHARE) * root / root.sum() + self.UNIFORM_SHARE * uniform

    def place(self, u: Tensor) -> Tensor:
        """The quantile of the density that is constant within each timestep."""
        p = self.probabilities().to(u.device)
        edges = p.cumsum(0)
        t = torch.searchsorted(edges, u.double() * edges[-1], right=True).clamp(max=self.timesteps - 1)
        within = ((u * edges[-1] - (edges[t] - p[t])) / p[t]).clamp(1e-9, 1 - 1e-9)  # so that ⌊place·T⌋ is t again
        return (t + within) / self.timesteps

    def weights(self, place: Tensor) -> Tensor | None:
        """1/(T p_t), float64 (N,): with it the mean loss has the expectation it has under uniform times."""
        p = self.probabilities().to(place.device)
        return 1 / (self.timesteps * p[(place * self.timesteps).long()])

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Remember unweighted losses (n,) at timesteps t (n,), rows of the global batch in the order of k."""
        for timestep, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if not math.isfinite(loss):
                continue
            row, count = self.history[timestep], int(self.counts[timestep])
            if count == self.KEPT:
                row[:-1] = row[1:].clone()
                row[-1] = loss
            else:
                row[count] = loss
                self.counts[timestep] = count + 1

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {"history": self.history, "counts": self.counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            if state[name].shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}")
            value.copy_(state[name])


def by_noise_level(losses: Tensor, place: Tensor, bins: int = LEVEL_BINS) -> tuple[Tensor, Tensor]:
    """(sums, counts), float64 (bins,) each, of losses (N,) whose place (N,) falls in each eighth of the process.

    Sums, not means, so that ranks and micro-batches add up; the mean of a bin is its sum over its count.
    """
    bin_of = (place * bins).long().clamp(max=bins - 1)
    zeros = torch.zeros(bins, dtype=torch.float64, device=losses.device)
    sums = zeros.index_add(0, bin_of, losses.detach().double())
    return sums, zeros.index_add(0, bin_of, torch.ones_like(losses, dtype=torch.float64))


def middles(bins: int = LEVEL_BINS) -> np.ndarray:
    """Fixed places for a validation loss by `losses_at`: the middle of every bin, float64 (bins,)."""
    return (np.arange(bins) + 0.5) / bins
