"""Noise schedules: one float64 table of ᾱ_t, everything else derived from it, and the sub-sequences samplers walk.

t counts 0..T−1 and t = 0 is one step of noise; "before 0", written t = −1, is clean data with ᾱ = 1.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dtrain.errors import UserError


@dataclass(frozen=True, eq=False)
class Schedule:
    """x_t = α_t x_0 + σ_t ε, with α_t² + σ_t² = 1.

    Every table is float64 (T,) on the CPU: float32 would put 1 − ᾱ_0 off by 1.7e-4.
    """

    alpha_bar: Tensor  # ᾱ_t = α_t², strictly falling

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.alpha_bar)

    @cached_property
    def alpha(self) -> Tensor:
        """√ᾱ_t, the signal that is left."""
        return self.alpha_bar.sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        """√(1 − ᾱ_t), the standard deviation of the noise."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def snr(self) -> Tensor:
        """ᾱ_t / (1 − ᾱ_t)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def alpha_bar_at(self, t: int) -> float:
        """ᾱ_t as a Python float; 1 for t = −1."""
        return 1.0 if t == -1 else float(self.alpha_bar[t])


def linear(timesteps: int) -> Schedule:
    """β from 1e-4 to 0.02 in equal steps at T = 1000, scaled by 1000/T otherwise (Ho et al. 2020, section 4).

    Raises UserError where the scaled β would reach 1.
    """
    if timesteps <= 20:
        raise UserError(f"a linear schedule of diffusion.timesteps {timesteps} would have β ≥ 1; take at least 21")
    scale = 1000 / timesteps
    beta = torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64, device="cpu")
    return Schedule((1 - beta).cumprod(0))


def subsequence(timesteps: int, steps: int, spacing: str) -> list[int]:
    """The S timesteps a sampler visits, falling, all different, for every S from 1 to T.

    trailing: round(T − i·T/S) − 1, from T − 1 down.  (Stepping by −T/S instead gives S + 1 of them for some S.)
    leading:  ⌊i·T/S⌋, down to 0.  (Multiples of ⌊T/S⌋ would start at 599 for S = 600, T = 1000.)
    Both agree with the usual definitions when S divides T. Lin et al. 2023, table 2.
    """
    if not 1 <= steps <= timesteps:
        raise UserError(f"{steps} sampling steps do not fit a process of {timesteps} timesteps; take 1 to {timesteps}")
    if spacing == "trailing":
        return [round(timesteps - i * timesteps / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * timesteps // steps for i in reversed(range(steps))]
    raise UserError(f"unknown spacing {spacing!r}; known are trailing and leading")
