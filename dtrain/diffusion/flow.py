"""Rectified flow: a straight path from data to noise and its velocity (Liu et al. 2023; Lipman et al. 2023).

A network predicts the velocity itself, or x_0, of which the velocity follows (JiT, Li & He 2025).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.diffusion.prediction import target, to_eps, to_x0
from dtrain.diffusion.schedule import SIGMA_MAX, SIGMA_MIN, edm_sigmas
from dtrain.diffusion.tables import time_of_all

MODEL_TIME = 1000  # time embeddings are made for timesteps up to 1000


@dataclass(frozen=True, eq=False)
class RectifiedFlow:
    """x_t = (1 − t) x_0 + t ε for t in [0, 1], and a network that predicts dx/dt = ε − x_0, or x_0.

    time_scale: the model is told time_scale · t. prediction: velocity | x0. least_time: the loss of x0 is of the
    velocity (x_t − x̂_0)/t, which has no bound at t = 0, so it divides by no less than this.

    The trainer and the samplers use it as they use `GaussianDiffusion`; only the meaning of t differs.
    """

    time_scale: int = MODEL_TIME
    prediction: str = "velocity"
    least_time: float = 0.05

    snr_ends = None  # from infinity to 0, always
    clean = 0.0  # the time that samplers walk to
    clean_scale = 1  # lim α towards it

    @property
    def last_time(self) -> int:
        """What the model is told of pure noise: guidance intervals are shares of it."""
        return self.time_scale

    def time(self, place: Tensor) -> Tensor:
        """The place itself, float64 (N,)."""
        return place

    def level(self, t: float) -> tuple[float, float]:
        """(α_t, σ_t) = (1 − t, t)."""
        return 1 - t, t

    def level_told(self, time: float) -> tuple[float, float]:
        """(α, σ) of what the model is told, as `model_time` gives it."""
        return self.level(time / self.time_scale)

    def model_time(self, t: Tensor | float, x: Tensor) -> Tensor:
        """The model's time for the rows of x (N, …): time_scale · t, float32 (N,), from t (N,) or one float for all."""
        if isinstance(t, Tensor):
            return (self.time_scale * t).float()
        return time_of_all(self.time_scale * t, len(x), torch.float32, x.device)

    def walk(self, steps: int, spacing: str | list[int] = "trailing") -> list[float]:
        """Falling times above 0. trailing: 1, 1 − 1/S, …, 1/S, equal steps.

        edm: 1, and t = σ/(1 + σ) of all but the first of EDM's σ from 80 to 0.002, where σ/α is t/(1 − t).
        """
        if spacing == "edm":
            return [1.0, *(sigma / (1 + sigma) for sigma in edm_sigmas(steps, SIGMA_MAX, SIGMA_MIN)[1:])]
        assert spacing == "trailing"
        return [1 - i / steps for i in range(steps)]

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """x_t in x_0's dtype; t is float (N,) or one float for all rows."""
        alpha, sigma = self._levels(t, x0)
        return alpha * x0 + sigma * noise

    def split(self, output: Tensor) -> tuple[Tensor, None]:
        """The output, and no variance channels."""
        return output, None

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """What a perfect network would answer at t: the velocity, the same at every t, or x_0."""
        return target(self.prediction, x0, noise, *self._levels(t, x0))

    def error(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """The error of the velocity, whose square the loss is.

        Of a network that predicts x_0 it is (x_t − x̂_0)/d − (x_t − x_0)/d with d = max(t, least_time), in which x_t
        cancels (Li & He 2025, section 4.3).
        """
        error = output - self.target(x0, noise, t)
        if self.prediction == "velocity":
            return error
        _, sigma = self._levels(t, x0)
        least = self.least_time
        return -error / (sigma.clamp(min=least) if isinstance(sigma, Tensor) else max(sigma, least))

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x_t + (1 − t) velocity, or of x̂_0 the ε with which x_t lies on its path; t > 0."""
        return to_eps(self.prediction, output.to(x_t.dtype), x_t, *self._levels(t, x_t))

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x_t − t velocity, or the output itself."""
        return to_x0(self.prediction, output.to(x_t.dtype), x_t, *self._levels(t, x_t))

    def _levels(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        if not isinstance(t, Tensor):
            return self.level(t)
        t = t.to(torch.float64).view(-1, *[1] * (like.dim() - 1))
        return (1 - t).to(like.dtype), t.to(like.dtype)
