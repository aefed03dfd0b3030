"""Rectified flow: a straight path from data to noise and its velocity (Liu et al. 2023; Lipman et al. 2023)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.diffusion.prediction import target, to_eps, to_x0
from dtrain.diffusion.times import UNIFORM, LogitNormal, Uniform

MODEL_TIME = 1000  # time embeddings are made for timesteps up to 1000, so the model is told 1000·t


@dataclass(frozen=True, eq=False)
class RectifiedFlow:
    """x_t = (1 − t) x_0 + t ε for t in [0, 1], and a network that predicts dx/dt = ε − x_0.

    The trainer and the samplers use it as they use `GaussianDiffusion`; only the meaning of t differs.
    """

    times: Uniform | LogitNormal = UNIFORM

    prediction = "velocity"
    clean = 0.0  # the time that samplers walk to
    last_time = MODEL_TIME  # the scale of what the model is told: guidance intervals are shares of it

    def place(self, u: Tensor) -> Tensor:
        """The times t in [0, 1) at which the rows with these u (N,) train, float64."""
        return self.times.place(u)

    def level(self, t: float) -> tuple[float, float]:
        """(α_t, σ_t) = (1 − t, t)."""
        return 1 - t, t

    def model_time(self, t: float, x: Tensor) -> Tensor:
        """What the model is told for every row of x (N, …): float32 (N,), 1000·t."""
        return torch.full((len(x),), MODEL_TIME * t, dtype=torch.float32, device=x.device)

    def walk(self, steps: int, spacing: str | list[int] = "trailing") -> list[float]:
        """1, 1 − 1/S, …, 1/S: equal steps down to clean data, the only spacing of a flow."""
        assert spacing == "trailing"
        return [1 - i / steps for i in range(steps)]

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """x_t in x_0's dtype; t is float (N,) or one float for all rows."""
        alpha, sigma = self._levels(t, x0)
        return alpha * x0 + sigma * noise

    def losses(
        self, model: Callable[[Tensor, Tensor, Tensor], Tensor], x0: Tensor, noise: Tensor, u: Tensor, labels: Tensor
    ) -> Tensor:
        """The squared error of the velocity of each row, its mean over C, H, W; in x0's dtype (N,).

        model(x (N, C, H, W), 1000·t float32 (N,), labels int64 (N,)) → (N, C, H, W); u float64 (N,) in [0, 1).
        """
        return self.losses_at(model, x0, noise, self.place(u), labels)

    def losses_at(
        self,
        model: Callable[[Tensor, Tensor, Tensor], Tensor],
        x0: Tensor,
        noise: Tensor,
        place: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """`losses` at given times (N,) in [0, 1], float64."""
        t = place
        output = model(self.noised(x0, noise, t), (MODEL_TIME * t).float(), labels).to(x0.dtype)
        return (output - target("velocity", x0, noise, 1 - t, t)).square().flatten(1).mean(1)

    def observe(self, u: Tensor, losses: Tensor) -> None:
        """Nothing: no time distribution of a flow has a memory."""

    def split(self, output: Tensor) -> tuple[Tensor, None]:
        """The velocity, and no variance channels."""
        return output, None

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
