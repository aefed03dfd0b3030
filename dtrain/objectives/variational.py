"""The bound of variational diffusion as what training descends (Kingma et al. 2021).

    loss = KL(q(x_1|x_0) ‖ N(0, I)) − log p(x_0|x at t = 0) + ½ w(t) ‖ε − ε̂‖²,  in bits per dimension

at a time t of each row; its mean is the bound, whose first two terms no network moves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dtrain.batch import Batch, Condition
from dtrain.diffusion import variational_bound as bound
from dtrain.diffusion.likelihood import BITS
from dtrain.diffusion.variational import Curve, VariationalDiffusion
from dtrain.models.layers import initialize
from dtrain.models.monotone import MonotoneCurve
from dtrain.objectives.objective import Losses, Network, Objective, Turn
from dtrain.position import Position

SCHEDULE = "schedule"  # the network of a learned γ


@dataclass(frozen=True, eq=False)
class VariationalBound(Objective):
    """lr_factor: of the network of a learned γ, whose learning rate is so many times the others'; None: none learns γ.

    In continuous time the bound does not depend on γ between its ends. There it is learned to make the estimate of a
    row quiet: its gradient is that of the square of the row's chain, the backbone's that of the chain itself (appendix
    I). The bound of a chain of timesteps does depend on γ, which then descends it too. Holds no generator: every random
    number comes as an argument.
    """

    process: VariationalDiffusion
    lr_factor: float | None = None

    parts = "bound_prior", "bound_chain", "bound_decoder"

    @property
    def turns(self) -> Mapping[str, Turn]:
        if self.lr_factor is None:
            return {"main": Turn(("backbone",))}
        return {"main": Turn(("backbone", SCHEDULE), lr_factors={SCHEDULE: self.lr_factor})}

    @property
    def networks(self) -> Mapping[str, type[nn.Module]]:
        return {} if self.lr_factor is None else {SCHEDULE: MonotoneCurve}

    @property
    def of_process(self) -> tuple[str, ...]:
        return tuple(self.networks)

    def standing_on(self, networks: Mapping[str, nn.Module]) -> "VariationalBound":
        if self.lr_factor is None:
            return self
        return replace(self, process=replace(self.process, curve=learned_curve(networks[SCHEDULE])))

    def losses(
        self, turn: str, networks: Mapping[str, Network], batch: Batch, condition: Condition, at: Position
    ) -> Losses:
        """batch: x_0 and noise, float32 (N, C, H, W), and time, float64 (N,) in [0, 1).

        The backbone: (x (N, C, H, W), process.model_time (N,), **condition) → (N, C, H, W).
        """
        place, x0, noise = batch["time"], batch["x_0"], batch["noise"]
        process = self.process if self.lr_factor is None else replace(self.process, curve=networks[SCHEDULE])
        terms = self._terms(process, networks["backbone"], x0, noise, place, condition)
        parts = {name: (term.detach().sum(), len(x0)) for name, term in zip(self.parts, terms, strict=True)}
        return Losses(sum(terms), place, parts)

    def losses_at(self, network: Network, x0: Tensor, noise: Tensor, place: Tensor, condition: Condition) -> Tensor:
        """The rows of `losses` at given places (N,) float64 in [0, 1)."""
        return sum(self._terms(self.process, network, x0, noise, place, condition))

    def _terms(
        self,
        process: VariationalDiffusion,
        network: Network,
        x0: Tensor,
        noise: Tensor,
        place: Tensor,
        condition: Condition,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prior, chain and decoder of each row (N,); the same noise serves the last two."""
        gamma, weight = process.gamma_and_weight(process.time(place))
        quieted: list[Tensor] = []  # 2 · chain of each row, once it is known
        if process.timesteps is None:
            for one in (gamma, weight):
                if one.requires_grad:
                    one.register_hook(lambda gradient: gradient * quieted[0])
        alpha, sigma = process.levels(gamma, x0)
        output = network(alpha * x0 + sigma * noise, process.told_as(gamma, x0), **condition).to(x0.dtype)
        chain = (BITS / 2 * weight).to(x0.dtype) * bound.squared_error(output, noise)
        quieted.append(2 * chain.detach().to(gamma.dtype))
        return bound.prior(process, x0), chain, bound.decoder(process, x0, noise)


def learned_curve(network: nn.Module) -> Curve:
    """The curve of a network that no longer learns, computed where it lies, for times on any device."""

    def curve(t: Tensor) -> tuple[Tensor, Tensor]:
        where = next(network.parameters()).device
        with torch.no_grad():
            value, slope = network(t.to(where))
        return value.to(t.device), slope.to(t.device)

    return curve


def beginning() -> Curve:
    """The curve that a learned γ begins as."""
    with torch.device("cpu"):
        network = MonotoneCurve()
    initialize(network, seed=0)
    return learned_curve(network)
