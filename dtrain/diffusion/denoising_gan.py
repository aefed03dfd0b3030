"""Denoising diffusion GAN: a chain of few steps that draws x_0 in each, and no mean of it (Xiao et al. 2022).

    x̂_0 = network(x_t, z, t) with z ~ N(0, I),   x_{t−1} ~ q(x_{t−1} | x_t, x̂_0)

In a chain of one step x_t is noise alone, and this is a generative adversarial network (Goodfellow et al. 2014).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.schedule import Schedule

BETA_MIN, BETA_MAX = 0.1, 20.0  # of the variance-preserving process that is cut into steps (Song et al. 2021)


def chain_of(timesteps: int) -> Schedule:
    """β_t = 1 − exp(−0.1/T − ½ · 19.9 (2t − 1)/T²) of t = 1 … T (appendix C); of one timestep ᾱ is 0."""
    t = torch.arange(1, timesteps + 1, dtype=torch.float64, device="cpu")
    kept = torch.exp(-BETA_MIN / timesteps - (BETA_MAX - BETA_MIN) * (2 * t - 1) / (2 * timesteps**2))
    return Schedule(kept.cumprod(0) if timesteps > 1 else torch.zeros_like(kept))


@dataclass(frozen=True, eq=False)
class DenoisingGAN(GaussianDiffusion):
    """A `GaussianDiffusion` whose network draws x_0, and is told `latent` numbers z beside the timestep."""

    prediction: str = "x0"
    latent: int = 100

    def told(self, t: Tensor, z: Tensor) -> Tensor:
        """What the model is told, float32 (N, 1 + latent), of t int64 (N,) and z (N, latent)."""
        return torch.cat([t[:, None].float(), z.float()], dim=1)

    @cached_property
    def _ahead(self) -> tuple[Tensor, Tensor]:
        """√(1 − β_t) and √β_t, float64 (T,) each."""
        return (1 - self.schedule.beta).sqrt(), self.schedule.beta.sqrt()

    @cached_property
    def _deviation(self) -> Tensor:
        """√β̃_t, float64 (T,)."""
        return self.chain.beta_tilde.sqrt()

    def pair(self, x0: Tensor, noise: Tensor, step_noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_{t−1}, x_t) drawn together, (N, C, H, W) each; x_{t−1} is x_0 itself at t = 0."""
        before = torch.where((t > 0).view(-1, *[1] * (x0.dim() - 1)), self.noised(x0, noise, (t - 1).clamp(min=0)), x0)
        kept, added = (self.table(values, t, x0) for values in self._ahead)
        return before, kept * before + added * step_noise

    def reverse(self, x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_{t−1} ~ q(x_{t−1} | x_t, x_0), (N, C, H, W), of standard normal noise; x_0 itself at t = 0."""
        chain = self.chain
        mean = self.table(chain.mean_x0, t, x_t) * x0 + self.table(chain.mean_xt, t, x_t) * x_t
        return mean + self.table(self._deviation, t, x_t) * noise
