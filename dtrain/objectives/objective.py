"""What every objective is: the networks that it trains, what a step descends, and what can then be generated."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtrain.batch import Batch, Condition
from dtrain.config import Optim
from dtrain.position import Position

Network = Callable[..., Tensor]  # (x (n, C, H, W), time (n,), **condition) → (n, O, H, W)


class Losses(NamedTuple):
    """What a call of `losses` gives. rows: the loss of each row (n,), whose mean over the global batch is descended.

    place: where in [0, 1) of the process each row was (n,), for the loss by noise level; None where there is no such
    place. parts: name → (sum, count), scalars, of what else is to be reported: their means over the global batch.
    sums: name → vector, summed over the rows, of what `on_reduced` is to have of the whole global batch. by_level: what
    the loss by noise level is made of (n,); None: the rows as `unweighted` gives them.
    """

    rows: Tensor
    place: Tensor | None = None
    parts: Mapping[str, tuple[Tensor, Tensor]] = {}
    sums: Mapping[str, Tensor] = {}
    by_level: Tensor | None = None


class Held(NamedTuple):
    """A network that no optimizer moves, as it is read from its source at every start; no checkpoint holds it.

    fingerprint: of its weights, such as their sha256; a run goes on with none other. weights: reads them, by the
    parameter's name; called on every rank. Raises UserError.
    """

    fingerprint: str
    weights: Callable[[], Mapping[str, Tensor]]


class Frozen(NamedTuple):
    """A network that stands whole beside the players on each rank, and the fingerprint of its weights."""

    network: nn.Module
    fingerprint: str


class Turn(NamedTuple):
    """One optimizer's part of a step. networks: by name, those that it moves and those of them that are only `held`:
    computed with, and partitioned at stage 3, as the others are.

    optim: its settings; None: the `optim` section. averaged: whether the `ema` section's averages are kept of them.
    lr_factors: network → factor of its learning rate, 1 for those left out. differentiates: whether
    its loss differentiates a gradient, which goes at ZeRO stage 2 at most, past the engine and uncompiled. from_step:
    the run's steps before it have no such turn.
    """

    networks: tuple[str, ...]
    optim: Optim | None = None
    averaged: bool = True
    lr_factors: Mapping[str, float] = {}
    differentiates: bool = False
    held: Mapping[str, Held] = {}
    from_step: int = 0


class Objective:
    """What objectives have in common: by default one optimizer moves the backbone. Draws no random number.

    process: what samplers walk; None of an objective that generates nothing. turns: of a step, in this order, by name;
    the first is the one that train.loss is of, and the network called "backbone" the one that samples are drawn with.
    networks: name → what allocates it, beside the backbone; each has `initial_value(name, shape, seed)` as backbones
    have. parts: names of the further means that `losses` reports. sums: name → number of elements of the vectors that
    `losses` gives to `on_reduced`; where there are any, a step begins when the ranks have summed those of the last.
    validates: whether there is a loss of held-out images at each place of the process (`losses_at`).
    of_process: those of `networks` that the process is made of, such as a learned schedule: whoever samples needs them.
    """

    process: object
    turns: Mapping[str, Turn] = {"main": Turn(("backbone",))}
    networks: Mapping[str, Callable[[], nn.Module]] = {}
    parts: tuple[str, ...] = ()
    sums: Mapping[str, int] = {}
    validates: bool = True
    of_process: tuple[str, ...] = ()

    def standing_on(self, networks: Mapping[str, nn.Module]) -> "Objective":
        """The same with the process that these networks make, those of `of_process`, for whoever no longer trains."""
        return self

    def open(self, device: torch.device) -> None:
        """Read the frozen networks that `losses` computes with beside the players'; a training does, on every rank.

        Raises UserError where their weights cannot be had.
        """

    @property
    def frozen(self) -> Mapping[str, str]:
        """Name → fingerprint of those networks: a run goes on with no others."""
        return {}

    def losses(
        self, turn: str, networks: Mapping[str, Network], batch: Batch, condition: Condition, at: Position
    ) -> Losses:
        """The losses of the rows of a micro-batch, in the turn of this name.

        networks: all of them; gradients flow into those that the turn moves. batch: what the parts of the config
        declare, and `x_0` (n, C, H, W), what the network is to learn. condition: what the network is told. at: the
        run's position before the step.
        """
        raise NotImplementedError

    def losses_at(self, network: Network, x0: Tensor, noise: Tensor, place: Tensor, condition: Condition) -> Tensor:
        """The backbone's losses (n,) at given places (n,) float64 in [0, 1) of the process, for validation."""
        raise NotImplementedError

    def unweighted(self, losses: Tensor, place: Tensor) -> Tensor:
        """Losses (n,) of the first turn as they would be had their places (n,) been chosen uniformly."""
        return losses

    @property
    def snr_ends(self) -> tuple[float, float] | None:
        """The signal-to-noise ratio at the process' first and last time, where it has such ends."""
        return getattr(self.process, "snr_ends", None)

    # -- state: what is learned beside the networks --------------------------------------------------------------------

    @property
    def observes(self) -> bool:
        """Whether `observe` must see the losses of every step: only then are they gathered."""
        return False

    def observe(self, u: Tensor, losses: Tensor) -> None:
        """See the first turn's losses (n,) of rows whose draw `time` was u (n,), in the order of k.

        Every rank gives the rows of the whole global batch, after the step's last call of `losses`.
        """

    def on_reduced(self, means: Mapping[str, Tensor]) -> None:
        """Take what the rows of a step that was taken gave as `sums`: float64, means over the global batch.

        On every rank alike, before the next step. What no row gave is not there.
        """

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the networks: float32, the same on every rank."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave. Raises ValueError for other shapes."""

    def reset(self) -> None:
        """As if no step had been taken."""
