"""Denoising of gamma noise: what `denoising.py` does, with another law of ε (Nachmani et al. 2021)."""

from dataclasses import dataclass

from torch import Tensor

from dtrain.batch import Condition
from dtrain.objectives.denoising import Denoising
from dtrain.objectives.objective import Network


@dataclass(frozen=True, eq=False)
class GammaDenoising(Denoising):
    """process: a `GammaDiffusion`, which makes ε of the batch's standard normals."""

    def losses_at(self, model: Network, x0: Tensor, noise: Tensor, place: Tensor, condition: Condition) -> Tensor:
        """The rows of `losses` at given places (N,) float64 in [0, 1), unweighted by how they were chosen."""
        return super().losses_at(model, x0, self.process.noise(noise, self.process.time(place)), place, condition)
