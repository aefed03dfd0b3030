"""The bound of variational diffusion as what training descends (Kingma et al. 2021).

    loss = KL(q(x_1|x_0) ‖ N(0, I)) − log p(x_0|x at t = 0) + ½ w(t) ‖ε − ε̂‖²,  in bits per dimension

at a time t of each row; its mean is the bound, whose first two terms no network moves.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dtrain.batch import Batch, Condition
from dtrain.diffusion import variational_bound as bound
from dtrain.diffusion.likelihood import BITS
from dtrain.diffusion.variational import VariationalDiffusion
from dtrain.objectives.objective import Losses, Network, Objective
from dtrain.position import Position


@dataclass(frozen=True, eq=False)
class VariationalBound(Objective):
    """Holds no generator: every random number comes as an argument."""

    process: VariationalDiffusion

    parts = "bound_prior", "bound_chain", "bound_decoder"

    def losses(
        self, turn: str, networks: Mapping[str, Network], batch: Batch, condition: Condition, at: Position
    ) -> Losses:
        """batch: x_0 and noise, float32 (N, C, H, W), and time, float64 (N,) in [0, 1).

        The backbone: (x (N, C, H, W), process.model_time (N,), **condition) → (N, C, H, W).
        """
        place, x0, noise = batch["time"], batch["x_0"], batch["noise"]
        terms = self._terms(self.process, networks["backbone"], x0, noise, place, condition)
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
        alpha, sigma = process.levels(gamma, x0)
        output = network(alpha * x0 + sigma * noise, process.told(gamma).float(), **condition).to(x0.dtype)
        chain = (BITS / 2 * weight).to(x0.dtype) * bound.squared_error(output, noise)
        return bound.prior(process, x0), chain, bound.decoder(process, x0, noise)
