"""The discrete Gaussian process: noising, and what a network's output says about x_0 and ε."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dtrain.diffusion.prediction import target, to_eps, to_x0
from dtrain.diffusion.schedule import Schedule, edm_subsequence, subsequence
from dtrain.diffusion.tables import on_device, time_of_all


@dataclass(frozen=True)
class Reverse:
    """q(x_p | x_t, x_0) = N(mean_x0 · x_0 + mean_xt · x_t, beta_tilde I), for p before t (Ho et al. 2020, (6) and (7)).

    beta = 1 − ᾱ_t/ᾱ_p belongs to the stride, never to the table of single steps. Floats, or float64 tables (T,).
    """

    mean_x0: Tensor | float
    mean_xt: Tensor | float
    beta: Tensor | float
    beta_tilde: Tensor | float

    @classmethod
    def between(cls, alpha_bar_t: Tensor | float, alpha_bar_p: Tensor | float) -> "Reverse":
        beta = 1 - alpha_bar_t / alpha_bar_p
        noise_t, noise_p = 1 - alpha_bar_t, 1 - alpha_bar_p
        return cls(
            mean_x0=alpha_bar_p**0.5 * beta / noise_t,
            mean_xt=(alpha_bar_t / alpha_bar_p) ** 0.5 * noise_p / noise_t,
            beta=beta,
            beta_tilde=noise_p / noise_t * beta,
        )


@dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """q(x_t | x_0) = N(α_t x_0, σ_t² I) and a network that predicts x_0 given x_t (Ho et al. 2020).

    prediction: eps | x0 | v.  variance of p(x_{t−1} | x_t): fixed_small (β̃) | fixed_large (β) | learned_range, where
    the second half of the output's channels interpolates log β̃ … log β.
    Holds no generator: every random number comes in as an argument. `config.Gaussian` refuses what cannot be combined.
    """

    schedule: Schedule
    prediction: str = "eps"
    variance: str = "fixed_small"
    decoder: str = "discretised"  # or continuous: for data that are not 8-bit pixels

    clean = -1  # the time that samplers walk to
    clean_scale = 1  # lim α towards it

    # -- levels ------------------------------------------------------------------------------------------------------

    def time(self, place: Tensor) -> Tensor:
        """⌊place·T⌋, int64 (N,), from float64 (N,) in [0, 1). Never T: (1 − 2⁻⁵³)·T still rounds below T."""
        return (place * self.schedule.timesteps).long()

    def level(self, t: int) -> tuple[float, float]:
        """(α_t, σ_t); (1, 0) for t = −1."""
        if t == -1:
            return 1.0, 0.0
        return float(self.schedule.alpha[t]), float(self.schedule.sigma[t])

    def alpha_bar(self, t: int) -> float:
        """α_t²; 1 for t = −1."""
        return self.schedule.alpha_bar_at(t)

    def level_told(self, time: float) -> tuple[float, float]:
        """(α, σ) of what the model is told, as `model_time` gives it."""
        return self.level(int(time))

    def model_time(self, t: Tensor | int, x: Tensor) -> Tensor:
        """The model's time input for the rows of x (N, …): int64 (N,), from t (N,) or one int for all."""
        return t if isinstance(t, Tensor) else time_of_all(t, len(x), torch.int64, x.device)

    @property
    def last_time(self) -> int:
        """The scale of what the model is told: guidance intervals are shares of it."""
        return self.schedule.timesteps

    @property
    def snr_ends(self) -> tuple[float, float]:
        """The signal-to-noise ratio at the first timestep and at the last."""
        return self.schedule.snr_ends

    def walk(self, steps: int, spacing: str | list[int]) -> list[int]:
        """The timesteps a sampler visits, falling."""
        if spacing == "edm":
            return edm_subsequence(self.schedule, steps)
        return subsequence(self.schedule.timesteps, steps, spacing)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t = α_t x_0 + σ_t ε, in x_0's dtype and shape (N, C, H, W); t is int64 (N,) or one int for all rows."""
        alpha, sigma = self._levels(t, x0)
        return alpha * x0 + sigma * noise

    # -- what an output says -----------------------------------------------------------------------------------------

    def split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """(prediction (N, C, H, W), its variance channels (N, C, H, W) or None)."""
        if self.variance != "learned_range":
            return output, None
        prediction, fraction = output.chunk(2, dim=1)
        return prediction, fraction

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The ε that the model's output at (x_t, t) stands for, in x_t's dtype."""
        prediction, _ = self.split(output)
        return to_eps(self.prediction, prediction.to(x_t.dtype), x_t, *self._levels(t, x_t))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What a perfect network would predict at t, shaped as x0."""
        return target(self.prediction, x0, noise, *self._levels(t, x0))

    def error(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What the loss squares: how far a prediction, without its variance channels, is from the target."""
        return prediction - self.target(x0, noise, t)

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The x̂_0 that the model's output at (x_t, t) stands for, in x_t's dtype."""
        prediction, _ = self.split(output)
        return to_x0(self.prediction, prediction.to(x_t.dtype), x_t, *self._levels(t, x_t))

    @cached_property
    def chain(self) -> Reverse:
        """The posterior of every single step t → t − 1, as tables (T,)."""
        alpha_bar = self.schedule.alpha_bar
        return Reverse.between(alpha_bar, torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]]))

    @cached_property
    def log_beta_tilde(self) -> Tensor:
        """log β̃_t, with the first, which is log 0, replaced by the second (Nichol & Dhariwal 2021, section 3.1)."""
        beta_tilde = self.chain.beta_tilde
        return torch.cat([beta_tilde[1:2], beta_tilde[1:]]).log()

    @cached_property
    def log_beta(self) -> Tensor:
        """log β_t; under fixed_large the first is log β̃_1, as under fixed_small: it is the decoder's width."""
        log_beta = self.chain.beta.log()
        return log_beta if self.variance == "learned_range" else torch.cat([self.log_beta_tilde[:1], log_beta[1:]])

    def log_variance(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The log variance of p(x_{t−1} | x_t) for t int64 (N,), broadcastable against x_t and in its dtype."""
        small, large = self.table(self.log_beta_tilde, t, x_t), self.table(self.log_beta, t, x_t)
        if self.variance == "fixed_small":
            return small
        if self.variance == "fixed_large":
            return large
        _, channels = self.split(output)
        return interpolated(channels.to(x_t.dtype), small, large)

    # -- shapes ------------------------------------------------------------------------------------------------------

    def _levels(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """α_t and σ_t, shaped and typed to multiply `like`: (N, 1, 1, 1), or Python floats when t is one int."""
        if isinstance(t, int):
            return self.level(t)
        return self.table(self.schedule.alpha, t, like), self.table(self.schedule.sigma, t, like)

    @staticmethod
    def table(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Entries t (N,) of a float64 table (T,) of this process, rounded once, to like's dtype: (N, 1, …)."""
        return on_device(values, t.device)[t].to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def interpolated(channels: Tensor, log_small: Tensor | float, log_large: Tensor | float) -> Tensor:
    """Learned range: log variance f·log β + (1 − f)·log β̃ with f = (channels + 1)/2, so that 0 is their middle."""
    fraction = (channels + 1) / 2
    return fraction * log_large + (1 - fraction) * log_small


def variance_between(variance: str, output_channels: Tensor | None, reverse: Reverse) -> Tensor | float:
    """The variance of one ancestral step of any stride, whose end is not clean data."""
    if variance == "fixed_small":
        return reverse.beta_tilde
    if variance == "fixed_large":
        return reverse.beta
    assert output_channels is not None
    return interpolated(output_channels, math.log(reverse.beta_tilde), math.log(reverse.beta)).exp()
