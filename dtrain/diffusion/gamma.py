"""Gamma noise in the place of normal noise, on the same schedule (Nachmani et al. 2021).

With θ_t = √ᾱ_t θ_0 and k̄_t = (1 − ᾱ_t)/(ᾱ_t θ_0²), u_t ~ Γ(k̄_t, 1):

    x_t = √ᾱ_t x_0 + θ_t (u_t − k̄_t),   of variance 1 − ᾱ_t and skewness 2 θ_0 √(ᾱ_t/(1 − ᾱ_t))

u_t is a sum: u_p of an earlier timestep and an independent Γ(k̄_t − k̄_p, 1). So u_p/u_t ~ Beta(k̄_p, k̄_t − k̄_p), and
independent of u_t: the exact posterior of any stride.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from dtrain.diffusion.gamma_law import LEAST, GammaLaw
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.solvers import Denoiser, predict, steps
from dtrain.errors import UserError


@dataclass(frozen=True, eq=False)
class GammaDiffusion(GaussianDiffusion):
    """x_t = α_t x_0 + σ_t ε with ε = (u_t − k̄_t)/√k̄_t, which `noise` makes of standard normals.

    theta_0: the larger, the more skewed. States are computed in float64 and rounded once. Raises UserError for a
    theta_0 with which a timestep's own noise has a law with a pole.
    """

    theta_0: float = 0.001

    def __post_init__(self):
        least = float(torch.diff(self.shapes, prepend=self.shapes.new_zeros(1)).min())
        if least < LEAST:
            most = self.theta_0 * (least / LEAST) ** 0.5
            raise UserError(
                f"diffusion.theta_0 {self.theta_0:g} gives a timestep's noise a gamma law of shape {least:.2g}, and "
                f"below {LEAST:g} it has a pole; take at most {most:.2g}"
            )

    @cached_property
    def shapes(self) -> Tensor:
        """k̄_t, float64 (T,)."""
        return 1 / (self.schedule.snr * self.theta_0**2)

    @cached_property
    def law(self) -> GammaLaw:
        """The law of every timestep's noise, by the timestep's number."""
        return GammaLaw(self.shapes)

    def noise(self, normals: Tensor, t: Tensor | int) -> Tensor:
        """ε, float64 and shaped as these standard normals (N, C, H, W), of t int64 (N,) or one int for all rows."""
        return self.law.standardised(normals, t)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t in x_0's dtype, of ε float64."""
        return super().noised(x0.double(), noise, t).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What a perfect network would predict at t, in x_0's dtype, of ε float64."""
        return super().target(x0.double(), noise, t).to(x0.dtype)


@torch.no_grad()
def ancestral_gamma(
    denoiser: Denoiser,
    process: GammaDiffusion,
    x_T: Tensor,
    timesteps: list[int],
    step_noise: Callable[[int], Tensor],
    clip: bool = False,
) -> Tensor:
    """x_0 by drawing u_p = u_t · Beta(k̄_p, k̄_t − k̄_p) at any stride, u_t being what x̂_0 leaves of x_t.

    step_noise: step i from 0 asks for the numbers 2 i and 2 i + 1; the last step draws nothing.
    """
    shapes = [float(process.shapes[t]) for t in timesteps]
    earlier, own = shapes[1:], [k_t - k_p for k_t, k_p in pairwise(shapes)]
    law = _law(tuple(earlier + own)) if earlier else None
    x = x_T
    for i, (t, p) in enumerate(steps(process, timesteps)):
        x0, _, _ = predict(denoiser, process, x, t, clip)
        if p == process.clean:
            return x0
        alpha_t, alpha_p = process.level(t)[0], process.level(p)[0]
        rest = x.double() - alpha_t * x0.double()
        u_t = (shapes[i] + rest / (alpha_t * process.theta_0)).clamp(min=0.0)  # x̂_0 may leave less than there is
        first, second = (
            k + k**0.5 * law.standardised(step_noise(2 * i + more), i + more * len(earlier))
            for more, k in enumerate((earlier[i], own[i]))
        )
        u_p = u_t * (first / (first + second))
        x = (alpha_p * (x0.double() + process.theta_0 * (u_p - earlier[i]))).to(x.dtype)
    return x


@lru_cache(maxsize=4)
def _law(shapes: tuple[float, ...]) -> GammaLaw:
    return GammaLaw(torch.tensor(shapes, dtype=torch.float64, device="cpu"))
