"""Which noise levels training visits: monotone maps of a uniform u in [0, 1) to a place in [0, 1) of the process.

A place of 0 is clean data and 1 is noise; the discrete process takes timestep ⌊place·T⌋, a flow takes the place itself.
Every map composes with stratified u. `weights` corrects for the map where the loss must keep its expectation.
"""

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


@dataclass(frozen=True)
class One:
    """Noise alone, t = 1 of a flow: what a network needs that is asked once (Liu et al. 2024, InstaFlow)."""

    def place(self, u: Tensor) -> Tensor:
        return torch.ones_like(u)

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
        """p_t, float64 (T,), where the losses were observed."""
        uniform = torch.full((self.timesteps,), 1 / self.timesteps, dtype=torch.float64, device=self.history.device)
        root = self.history.double().square().mean(1).sqrt()
        by_loss = (1 - self.UNIFORM_SHARE) * root / root.sum() + self.UNIFORM_SHARE * uniform
        is_known = (self.counts == self.KEPT).all() & (root.sum() > 0)  # stays on the device: reading it would wait
        return torch.where(is_known, by_loss, uniform)

    def place(self, u: Tensor) -> Tensor:
        """The quantile of the density that is constant within each timestep."""
        self._move_to(u.device)
        p = self.probabilities()
        edges = p.cumsum(0)
        t = torch.searchsorted(edges, u.double() * edges[-1], right=True).clamp(max=self.timesteps - 1)
        within = ((u * edges[-1] - (edges[t] - p[t])) / p[t]).clamp(1e-9, 1 - 1e-9)  # so that ⌊place·T⌋ is t again
        return (t + within) / self.timesteps

    def weights(self, place: Tensor) -> Tensor | None:
        """1/(T p_t), float64 (N,): with it the mean loss has the expectation it has under uniform times."""
        self._move_to(place.device)
        p = self.probabilities()
        return 1 / (self.timesteps * p[(place * self.timesteps).long()])

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """See unweighted losses (n,) at timesteps t (n,), rows of the global batch in the order of k.

        Those that are not finite are passed over. All at once, and nothing is read from a device: each row's place
        follows from how many of its timestep came before it.
        """
        self._move_to(losses.device)
        kept, nowhere = self.KEPT, self.timesteps
        t, order = torch.where(losses.isfinite(), t, nowhere).sort(stable=True)  # (n,) each: timesteps together
        new = torch.zeros(nowhere + 1, dtype=torch.int64, device=t.device).index_add_(0, t, torch.ones_like(t))
        number = torch.arange(len(t), device=t.device) - (new.cumsum(0) - new)[t]  # of a row among its timestep's
        surplus = (self.counts + new[:nowhere] - kept).clamp(min=0)  # (T,), the oldest, which make room
        left = torch.arange(kept, device=t.device) + surplus[:, None]  # (T, 10): what comes to each place
        old = torch.where(left < self.counts[:, None], self.history.gather(1, left.clamp(max=kept - 1)), 0.0)

        of = t.clamp(max=nowhere - 1)
        place = self.counts[of] + number - surplus[of]  # below 0: as many newer ones of the timestep follow
        target = torch.where((place < 0) | (t == nowhere), nowhere * kept, of * kept + place)
        values = torch.cat([old.flatten(), old.new_zeros(1)]).scatter(0, target, losses[order].to(old.dtype))
        self.history.copy_(values[:-1].view_as(old))
        self.counts.copy_((self.counts + new[:nowhere]).clamp(max=kept))

    def _move_to(self, device: torch.device) -> None:
        if self.history.device != device:
            self.history, self.counts = self.history.to(device), self.counts.to(device)

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
