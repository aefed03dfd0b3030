"""The discrete Gaussian process: noising, the training loss, and what a network's output says about x_0 and ε."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dtrain.diffusion.schedule import Schedule


@dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """q(x_t | x_0) = N(α_t x_0, σ_t² I) and a network that predicts ε from x_t (Ho et al. 2020).

    Holds no generator: every random number comes in as an argument.
    """

    schedule: Schedule
    prediction: str = "eps"

    def time(self, u: Tensor) -> Tensor:
        """⌊u·T⌋, int64 (N,), from u float64 (N,) in [0, 1). Never T: (1 − 2⁻⁵³)·T still rounds below T."""
        return (u * self.schedule.timesteps).long()

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t = α_t x_0 + σ_t ε, in x_0's dtype and shape (N, C, H, W); t is int64 (N,) or one int for all rows."""
        alpha, sigma = self._levels(t, x0)
        return alpha * x0 + sigma * noise

    def losses(
        self, model: Callable[[Tensor, Tensor, Tensor], Tensor], x0: Tensor, noise: Tensor, u: Tensor, labels: Tensor
    ) -> Tensor:
        """L_simple of each row: the mean of (ε − ε_θ(x_t, t))² over C, H, W (Ho et al. 2020, equation 14).

        model(x (N, C, H, W), t int64 (N,), labels int64 (N,)) → (N, C, H, W); x0 and noise float32 (N, C, H, W),
        u float64 (N,) in [0, 1). Returns float32 (N,), whatever the model computes in.
        """
        t = self.time(u)
        output = model(self.noised(x0, noise, t), t, labels)
        return (output.float() - noise).square().flatten(1).mean(1)

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The ε that the model's output at (x_t, t) stands for, in x_t's dtype."""
        return output.to(x_t.dtype)

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The x̂_0 that the model's output at (x_t, t) stands for, in x_t's dtype: (x_t − σ_t ε)/α_t."""
        alpha, sigma = self._levels(t, x_t)
        return (x_t - sigma * self.eps(output, x_t, t)) / alpha

    def _levels(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """α_t and σ_t, shaped and typed to multiply `like`: (N, 1, 1, 1), or Python floats when t is one int."""
        if isinstance(t, int):
            return float(self.schedule.alpha[t]), float(self.schedule.sigma[t])
        shape = (-1, *[1] * (like.dim() - 1))
        alpha, sigma = (table.to(t.device)[t] for table in (self.schedule.alpha, self.schedule.sigma))
        return alpha.to(like.dtype).view(shape), sigma.to(like.dtype).view(shape)
