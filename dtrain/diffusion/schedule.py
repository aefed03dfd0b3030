"""Noise schedules: one float64 table of ᾱ_t, everything else derived from it, and the sub-sequences samplers walk.

t counts 0..T−1 and t = 0 is one step of noise; "before 0", written t = −1, is clean data with ᾱ = 1.
"""

import math
from collections.abc import Callable
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

    alpha_bar: Tensor  # ᾱ_t = α_t², strictly falling; 0 at the end for zero terminal SNR

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

    @cached_property
    def beta(self) -> Tensor:
        """β_t = 1 − ᾱ_t/ᾱ_{t−1}."""
        return 1 - self.alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), self.alpha_bar[:-1]])

    @property
    def snr_ends(self) -> tuple[float, float]:
        """(SNR_0, SNR_{T−1}). The last should be near 0: sampling starts from noise without any signal."""
        return float(self.snr[0]), float(self.snr[-1])

    @property
    def has_zero_terminal_snr(self) -> bool:
        return float(self.alpha_bar[-1]) == 0

    def alpha_bar_at(self, t: int) -> float:
        """ᾱ_t as a Python float; 1 for t = −1."""
        return 1.0 if t == -1 else float(self.alpha_bar[t])


def named(name: str, timesteps: int, zero_terminal_snr: bool = False) -> Schedule:
    """The schedule a configuration names. Raises UserError for one that cannot be."""
    schedule = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine, "sigmoid": sigmoid}[name](timesteps)
    return with_zero_terminal_snr(schedule) if zero_terminal_snr else schedule


def linear(timesteps: int) -> Schedule:
    """β from 1e-4 to 0.02 in equal steps at T = 1000, scaled by 1000/T otherwise (Ho et al. 2020, section 4).

    Raises UserError where the scaled β would reach 1.
    """
    scale = 1000 / timesteps
    return _from_beta(_ramp(1e-4 * scale, 0.02 * scale, timesteps), "linear", least=21)


def scaled_linear(timesteps: int) -> Schedule:
    """√β from √0.00085 to √0.012 in equal steps at T = 1000, β scaled by 1000/T otherwise (Rombach et al. 2022).

    Raises UserError where the scaled β would reach 1.
    """
    root = _ramp(math.sqrt(0.00085), math.sqrt(0.012), timesteps)
    return _from_beta(root.square() * (1000 / timesteps), "scaled_linear", least=13)


def cosine(timesteps: int) -> Schedule:
    """ᾱ(s) = cos²((s + 0.008)/1.008 · π/2) of the elapsed share s, β at most 0.999 (Nichol & Dhariwal 2021, (17))."""
    return _from_alpha_bar(lambda s: torch.cos((s + 0.008) / 1.008 * math.pi / 2).square(), timesteps)


def sigmoid(timesteps: int) -> Schedule:
    """ᾱ(s) falls as a logistic curve from −3 to 3, rescaled to run from 1 to 0; β at most 0.999 (Jabri et al. 2022)."""
    return _from_alpha_bar(lambda s: torch.sigmoid(3 - 6 * s) - torch.sigmoid(torch.tensor(-3.0).double()), timesteps)


def with_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule with √ᾱ shifted and stretched so that it ends at exactly 0 and begins where it did.

    Lin et al. 2023, algorithm 1.
    """
    first, last = schedule.alpha[0], schedule.alpha[-1]
    return Schedule(((schedule.alpha - last) * (first / (first - last))).square())


def _ramp(first: float, last: float, timesteps: int) -> Tensor:
    return torch.linspace(first, last, timesteps, dtype=torch.float64, device="cpu")


def _from_beta(beta: Tensor, name: str, least: int) -> Schedule:
    if float(beta[-1]) >= 1:
        raise UserError(f"a {name} schedule of diffusion.timesteps {len(beta)} would have β ≥ 1; take at least {least}")
    return Schedule((1 - beta).cumprod(0))


def _from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], timesteps: int) -> Schedule:
    """β_t = 1 − ᾱ((t+1)/T)/ᾱ(t/T), at most 0.999 so that the end keeps a trace of signal."""
    values = alpha_bar(_ramp(0, 1, timesteps + 1))
    return Schedule((1 - (1 - values[1:] / values[:-1]).clamp(max=0.999)).cumprod(0))


def subsequence(timesteps: int, steps: int, spacing: str | list[int]) -> list[int]:
    """The S timesteps a sampler visits, falling, all different, for every S from 1 to T.

    trailing: round(T − i·T/S) − 1, from T − 1 down.  (Stepping by −T/S instead gives S + 1 of them for some S.)
    leading:  ⌊i·T/S⌋, down to 0.  (Multiples of ⌊T/S⌋ would start at 599 for S = 600, T = 1000.)
    linspace: round(i·(T − 1)/(S − 1)), both ends; T − 1 alone for S = 1.
    quad:     ⌊0.8 T (i/(S − 1))²⌋, but at least i, so that none comes twice: dense near the data. It starts at 0.8 T
              as in DDIM's experiments, until S leaves no other room; 0.8 T alone for S = 1.
    A list is taken as it is, if it falls strictly within the process and has S members.
    The first three agree with the usual definitions when S divides T (Lin et al. 2023, table 2). `edm_subsequence` has
    a further one, which looks at the levels.
    """
    _check_fits(timesteps, steps)
    if isinstance(spacing, list):
        return _listed(timesteps, steps, spacing)
    if spacing == "trailing":
        return [round(timesteps - i * timesteps / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * timesteps // steps for i in reversed(range(steps))]
    gaps = max(1, steps - 1)
    rising = range(steps) if steps > 1 else [1]
    if spacing == "linspace":
        return [round(i * (timesteps - 1) / gaps) for i in reversed(rising)]
    if spacing == "quad":
        return [min(max(4 * timesteps * i * i // (5 * gaps * gaps), i), timesteps - 1) for i in reversed(rising)]
    raise UserError(
        f"unknown spacing {spacing!r}; known are trailing, leading, linspace, quad, edm and a list of timesteps"
    )


SIGMA_MAX, SIGMA_MIN = 80.0, 0.002  # EDM's ends of σ/α, for data of deviation ½ (Karras et al. 2022)


def edm_sigmas(steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> list[float]:
    """Falling σ/α between these, equal steps of its 1/ρ-th power (Karras et al. 2022, equation 5); σ_max alone for 1.

    σ_i = (σ_max^(1/ρ) + i/(S − 1) (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ: the larger ρ, the denser near the data.
    """
    if steps == 1:
        return [sigma_max]
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [sigma_max, *((high + i / (steps - 1) * (low - high)) ** rho for i in range(1, steps - 1)), sigma_min]


def edm_subsequence(schedule: Schedule, steps: int) -> list[int]:
    """The S timesteps nearest to `edm_sigmas` in log σ/α, falling, from T − 1 to 0; T − 1 alone for S = 1.

    Where two would be the same, the noisier one moves up to the next timestep that is free; towards T − 1, where none
    is, the cleaner ones move down. σ begins at that of T − 1, but at no more than 2 SIGMA_MAX, which is EDM's for data
    of deviation 1: from the 20,000 of a cosine schedule three steps of five would see nothing but noise.
    """
    last = schedule.timesteps - 1
    _check_fits(schedule.timesteps, steps)
    ratios = schedule.sigma / schedule.alpha  # (T,), rising
    sigmas = edm_sigmas(steps, min(2 * SIGMA_MAX, float(ratios[-1])), float(ratios[0]))
    wanted = torch.tensor(sigmas, dtype=torch.float64, device="cpu").log()
    rising = ratios.log()
    above = torch.searchsorted(rising, wanted).clamp(1, last)
    nearest = torch.where(rising[above] - wanted < wanted - rising[above - 1], above, above - 1).tolist()
    nearest[0], found = last, []
    for i, t in enumerate(reversed(nearest)):
        free = found[-1] + 1 if found else 0
        found.append(min(max(t, free), last - (steps - 1 - i)))
    return found[::-1]


def _check_fits(timesteps: int, steps: int) -> None:
    if not 1 <= steps <= timesteps:
        raise UserError(f"{steps} sampling steps do not fit a process of {timesteps} timesteps; take 1 to {timesteps}")


def _listed(timesteps: int, steps: int, listed: list[int]) -> list[int]:
    if len(listed) != steps:
        raise UserError(f"the spacing lists {len(listed)} timesteps, but {steps} sampling steps are asked for")
    for i, t in enumerate(listed):
        if not 0 <= t < (listed[i - 1] if i else timesteps):
            raise UserError(
                f"timestep {t} at place {i} of the spacing is out of order; list them falling, from at most "
                f"{timesteps - 1} to at least 0"
            )
    return list(listed)
