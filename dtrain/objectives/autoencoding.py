"""Autoencoding: pictures through a Gaussian over latents and back (Kingma & Welling 2014; Rombach et al. 2022).

    loss = Σ |x − x̂| + kl_weight · KL(N(mean, deviation²) ‖ N(0, I)),   x̂ = decoder(mean + deviation · ε)

both sums over a picture's elements, divided by their number, so that the learning rate of one size fits another.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dtrain.batch import Batch, Condition
from dtrain.objectives.objective import Losses, Network, Objective
from dtrain.position import Position


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) ‖ N(0, I)) in nats (N,), summed over all but the rows."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class Autoencoding(Objective):
    """reconstruction: l1 | l2. Reports the mean squared error of pixels in [−1, 1], and the divergence in nats."""

    reconstruction: str = "l1"
    kl_weight: float = 1e-6

    process = None
    parts = ("mse", "kl")

    def losses(
        self, turn: str, networks: Mapping[str, Network], batch: Batch, condition: Condition, at: Position
    ) -> Losses:
        """batch: x_0 float32 (N, C, H, W) in [−1, 1], and posterior, standard normal (N, Z, h, w)."""
        x = batch["x_0"]
        pixels, mean, log_variance = networks["backbone"](x, batch["posterior"])
        error, kl = pixels - x, divergence(mean, log_variance)
        squares = error.square().flatten(1).mean(1)
        distance = squares if self.reconstruction == "l2" else error.abs().flatten(1).mean(1)
        rows = distance + self.kl_weight / x[0].numel() * kl
        n = len(x)
        return Losses(rows, None, {"mse": (squares.detach().sum(), n), "kl": (kl.detach().sum(), n)})
