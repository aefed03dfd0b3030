"""Denoising whose levels are weighted by a learned uncertainty (Karras et al. 2024, EDM2, equation 22).

    loss = L/e^u + u,   L the loss of `denoising.py` at a level and u what a small network says of that level

At the least u is ln L, and every level pulls with the same strength however large its loss is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dtrain.batch import Batch, Condition
from dtrain.models.loss_uncertainty import LossUncertainty
from dtrain.objectives.denoising import Denoising
from dtrain.objectives.objective import Losses, Network, Turn
from dtrain.position import Position

NETWORK = "uncertainty"


@dataclass(frozen=True, eq=False)
class UncertainDenoising(Denoising):
    """Reports `mse`, the mean of L, and `uncertainty`, that of u; the loss by noise level is L."""

    turns = MappingProxyType({"main": Turn(("backbone", NETWORK))})
    networks = MappingProxyType({NETWORK: LossUncertainty})
    parts = ("mse", "uncertainty")

    def losses(
        self, turn: str, networks: Mapping[str, Network], batch: Batch, condition: Condition, at: Position
    ) -> Losses:
        """batch: as of `Denoising.losses`. The rows have x_0's dtype."""
        x0, place = batch["x_0"], self.place(batch["time"])
        squared = self.losses_at(networks["backbone"], x0, batch["noise"], place, condition)  # (n,)
        told = self.process.model_time(self.process.time(place), x0)
        u = networks[NETWORK](told).to(squared.dtype)  # (n,)
        parts = {"mse": squared, "uncertainty": u}
        rows = squared * (-u).exp() + u
        by_level = squared.detach()
        return Losses(rows, place, {n: (v.detach().sum(), len(x0)) for n, v in parts.items()}, by_level=by_level)
