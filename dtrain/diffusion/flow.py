"""Rectified flow: a straight path from data to noise and its velocity (Liu et al. 2023; Lipman et al. 2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.diffusion.prediction import target, to_eps, to_x0
from dtrain.diffusion.tables import time_of_all

MODEL_TIME = 1000  # time embeddings are made for timesteps up to 1000


@dataclass(frozen=True, eq=False)
class RectifiedFlow:
    """x_t = (1 − t) x_0 + t ε for t in [0, 1], and a network that predicts dx/dt = ε − x_0.

    time_scale: the model is told time_scale · t.

    The trainer and the samplers use it as they use `GaussianDiffusion`; only the meaning of t differs.
    """

    time_scale: int = MODEL_TIME

    prediction = "velocity"
    snr_ends = None  # from infinity to 0, always
    clean = 0.0  # the time that samplers walk to

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
        """1, 1 − 1/S, …, 1/S: equal steps down to clean data, the only spacing of a flow."""
        assert spacing == "trailing"
        return [1 - i / steps for i in range(steps)]

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """x_t in x_0's dtype; t is float (N,) or one float for all rows."""
        alpha, sigma = self._levels(t, x0)
        return alpha * x0 + sigma * noise

    def split(self, output: Tensor) -> tuple[Tensor, None]:
        """The velocity, and no variance channels."""
        return output, None

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """The velocity, the same at every t."""
        return target("velocity", x0, noise, *self._levels(t, x0))

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x_t + (1 − t) velocity."""
        return to_eps("velocity", output.to(x_t.dtype), x_t, *self._levels(t, x_t))

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x_t − t velocity."""
        return to_x0("velocity", output.to(x_t.dtype), x_t, *self._levels(t, x_t))

    def _levels(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        if not isinstance(t, Tensor):
            return self.level(t)
        t = t.to(torch.float64).view(-1, *[1] * (like.dim() - 1))
        return (1 - t).to(like.dtype), t.to(like.dtype)
