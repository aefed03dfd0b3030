"""One step from noise to a picture, with a perceptual distance beside the squared error (Liu et al. 2024, InstaFlow).

    x̂_0 = ε − network(ε, 1),   loss = ‖x̂_0 − x_0‖² + weight · d(x̂_0, x_0)

x_0 is what the noise ε was led to by many steps. The squared error is that of the velocity, as of `denoising.py`, whose
estimate at t = 1 is the picture that one step draws: so a distance of pictures has something to look at.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dtrain.batch import Batch, Condition
from dtrain.config.perceptual import LPIPS, EfficientNetLite0
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.objectives.denoising import Denoising
from dtrain.objectives.objective import Losses, Network, Objective
from dtrain.position import Position


class PerceptualOneStep(Objective):
    """Reports `mse`, the squared error, and `perceptual`, the distance; the loss by noise level is the former."""

    parts = ("mse", "perceptual")

    def __init__(self, process: RectifiedFlow, section: LPIPS | EfficientNetLite0):
        self.process, self._section, self._denoising = process, section, Denoising(process)
        self._distance = None  # of features, once `open` has read them

    def open(self, device: torch.device) -> None:
        from dtrain.objectives import perceptual  # only a training needs it

        self._distance = perceptual.build(self._section, device)

    @property
    def frozen(self) -> Mapping[str, str]:
        return {} if self._distance is None else {"diffusion.perceptual": self._distance.fingerprint}

    def losses(
        self, turn: str, networks: Mapping[str, Network], batch: Batch, condition: Condition, at: Position
    ) -> Losses:
        """batch: x_0 in [−1, 1] and the noise that it was drawn from, float32 (N, C, H, W)."""
        x0, noise = batch["x_0"], batch["noise"]
        place, process = torch.ones_like(batch["time"]), self.process
        x_t = process.noised(x0, noise, place)
        output = networks["backbone"](x_t, process.model_time(place, x0), **condition).to(x0.dtype)
        squared = self._denoising.simple(output, x0, noise, place)
        distance = self._distance(process.x0(output, noise, place), x0)
        parts = {"mse": squared.detach(), "perceptual": distance.detach()}
        rows = squared + self._section.weight * distance
        return Losses(rows, place, {n: (v.sum(), len(x0)) for n, v in parts.items()}, by_level=parts["mse"])

    def losses_at(self, network: Network, x0: Tensor, noise: Tensor, place: Tensor, condition: Condition) -> Tensor:
        """The squared error of the velocity alone at given places (N,) float64 in [0, 1)."""
        return self._denoising.losses_at(network, x0, noise, place, condition)
