"""The discrete Gaussian process: noising, the training losses, and what a network's output says about x_0 and ε."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dtrain.diffusion import likelihood
from dtrain.diffusion.prediction import squared_error_weight, target, to_eps, to_x0
from dtrain.diffusion.schedule import Schedule, subsequence
from dtrain.diffusion.times import UNIFORM, LogitNormal, SecondMoment, Uniform

HYBRID = 0.001  # λ of L_hybrid, with L_VLB in bits/dim (Nichol & Dhariwal 2021, section 3.1)


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
    """q(x_t | x_0) = N(α_t x_0, σ_t² I) and a network that speaks of x_0 given x_t (Ho et al. 2020).

    prediction: eps | x0 | v.  variance of p(x_{t−1} | x_t): fixed_small (β̃) | fixed_large (β) | learned_range, where
    the second half of the output's channels interpolates log β̃ … log β.  loss: simple | hybrid | vlb.
    Holds no generator: every random number comes in as an argument. `config.Gaussian` refuses what cannot be combined.
    """

    schedule: Schedule
    prediction: str = "eps"
    variance: str = "fixed_small"
    loss: str = "simple"
    min_snr_gamma: float | None = None
    times: Uniform | LogitNormal | SecondMoment = UNIFORM
    decoder: str = "discretised"  # or continuous: for data that are not 8-bit pixels

    clean = -1  # the time that samplers walk to

    # -- levels ------------------------------------------------------------------------------------------------------

    def place(self, u: Tensor) -> Tensor:
        """Where in [0, 1) of the process the rows with these u (N,) train."""
        return self.times.place(u)

    def time(self, place: Tensor) -> Tensor:
        """⌊place·T⌋, int64 (N,), from float64 (N,) in [0, 1). Never T: (1 − 2⁻⁵³)·T still rounds below T."""
        return (place * self.schedule.timesteps).long()

    def level(self, t: int) -> tuple[float, float]:
        """(α_t, σ_t); (1, 0) for t = −1."""
        if t == -1:
            return 1.0, 0.0
        return float(self.schedule.alpha[t]), float(self.schedule.sigma[t])

    def model_time(self, t: int, x: Tensor) -> Tensor:
        """What the model is told for every row of x (N, …): int64 (N,)."""
        return torch.full((len(x),), t, device=x.device)

    @property
    def last_time(self) -> int:
        """The scale of what the model is told: guidance intervals are shares of it."""
        return self.schedule.timesteps

    def walk(self, steps: int, spacing: str | list[int]) -> list[int]:
        """The timesteps a sampler visits, falling."""
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

    # -- training ----------------------------------------------------------------------------------------------------

    def losses(
        self, model: Callable[[Tensor, Tensor, Tensor], Tensor], x0: Tensor, noise: Tensor, u: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss of each row; their mean over the global batch is what training descends.

        simple: the squared error of the prediction, its mean over C, H, W (Ho et al. 2020, equation 14), times the
        min-SNR weight where there is one. vlb: T·L_t in bits/dim, an unbiased estimate of the bound without its
        constant L_T. hybrid: simple + 0.001·vlb in which the mean is detached, so that the bound trains the variance
        alone.

        model(x (N, C, H, W), t int64 (N,), labels int64 (N,)) → (N, C or 2C, H, W); x0 and noise float32 (N, C, H, W),
        u float64 (N,) in [0, 1). Returns x0's dtype (N,), whatever the model computes in.
        """
        place = self.place(u)
        losses, weights = self.losses_at(model, x0, noise, place, labels), self.times.weights(place)
        return losses if weights is None else losses * weights.to(losses.dtype)

    def losses_at(
        self,
        model: Callable[[Tensor, Tensor, Tensor], Tensor],
        x0: Tensor,
        noise: Tensor,
        place: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """`losses` at given places (N,) float64 in [0, 1) of the process, unweighted by how they were chosen."""
        t = self.time(place)
        x_t = self.noised(x0, noise, t)
        output = model(x_t, t, labels).to(x0.dtype)
        if self.loss == "vlb":
            losses = self.schedule.timesteps * likelihood.term(self, output, x0, x_t, t)
        else:
            losses = self._simple(output, x0, noise, t)
        if self.loss == "hybrid":
            prediction, channels = self.split(output)
            detached = torch.cat([prediction.detach(), channels], dim=1)
            bound = self.schedule.timesteps * likelihood.term(self, detached, x0, x_t, t)
            losses = losses + HYBRID * bound
        return losses

    def _simple(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        prediction, _ = self.split(output)
        error = prediction - target(self.prediction, x0, noise, *self._levels(t, x0))
        losses = error.square().flatten(1).mean(1)
        if self.min_snr_gamma is None:
            return losses
        weight = squared_error_weight(self.prediction, self.schedule.snr, self.min_snr_gamma)
        return losses * weight.to(t.device)[t].to(losses.dtype)

    def observe(self, u: Tensor, losses: Tensor) -> None:
        """Let a time distribution with a memory see the losses (n,) of rows with these u (n,), in the order of k.

        Every rank gives the rows of the whole global batch, after the step's last call of `losses`.
        """
        if isinstance(self.times, SecondMoment):
            place = self.place(u)
            self.times.observe(self.time(place), losses.detach() / self.times.weights(place))

    # -- shapes ------------------------------------------------------------------------------------------------------

    def _levels(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """α_t and σ_t, shaped and typed to multiply `like`: (N, 1, 1, 1), or Python floats when t is one int."""
        if isinstance(t, int):
            return self.level(t)
        return self.table(self.schedule.alpha, t, like), self.table(self.schedule.sigma, t, like)

    @staticmethod
    def table(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Entries t (N,) of a float64 table (T,), rounded once, to like's dtype: (N, 1, …)."""
        return values.to(t.device)[t].to(like.dtype).view(-1, *[1] * (like.dim() - 1))


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
