"""Variational diffusion: a process told by its γ, the log of noise to signal (Kingma et al. 2021).

    x_t = α_t x_0 + σ_t ε,   σ_t² = sigmoid(γ(t)),   α_t² = sigmoid(−γ(t)),   SNR = e^(−γ),   t in [0, 1]

γ grows from gamma_0 at t = 0 to gamma_1 at t = 1 along a curve: a straight line, or a network's (`models/monotone.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.diffusion.schedule import edm_sigmas
from dtrain.diffusion.tables import time_of_all

MODEL_TIME = 1000  # what the model is told of pure noise: time embeddings are made for timesteps up to 1000

Curve = Callable[[Tensor], tuple[Tensor, Tensor]]  # t (n,) in [0, 1] → (value, slope), (n,); from 0 to 1; all float64


def straight(t: Tensor) -> tuple[Tensor, Tensor]:
    """γ grows evenly."""
    return t, torch.ones_like(t)


@dataclass(frozen=True, eq=False)
class VariationalDiffusion:
    """q(x_t | x_0) for every t in [0, 1], and a network that predicts ε.

    timesteps: T of a discrete chain, whose times are 1/T, 2/T, …, 1; None: all times. decoder: softmax, over the 256
    levels of 8-bit pixels, or continuous: the density of other data. The model is told γ, scaled from 0 at gamma_0 to
    1000 at gamma_1.

    The trainer and the samplers use it as they use `GaussianDiffusion`; a step of a sampler is the posterior's own.
    """

    gamma_0: float = -13.3
    gamma_1: float = 5.0
    timesteps: int | None = None
    decoder: str = "softmax"
    curve: Curve = straight

    prediction = "eps"
    variance = "fixed_small"
    clean = -1.0  # the time that samplers walk to: x_0 itself, where x at t = 0 still has noise
    clean_scale = 1.0
    last_time = MODEL_TIME  # guidance intervals are shares of it

    # -- levels ------------------------------------------------------------------------------------------------------

    @property
    def snr_ends(self) -> tuple[float, float]:
        """The signal-to-noise ratio at t = 0 and at t = 1."""
        return math.exp(-self.gamma_0), math.exp(-self.gamma_1)

    def time(self, place: Tensor) -> Tensor:
        """The place itself, or the timestep (⌊place·T⌋ + 1)/T that it is of; float64 (N,)."""
        if self.timesteps is None:
            return place
        return ((place * self.timesteps).floor() + 1) / self.timesteps

    def gamma(self, t: Tensor | float) -> Tensor | float:
        """γ, float64 (N,) of t (N,), or a float of one."""
        if isinstance(t, Tensor):
            return self._between(self.curve(t.double())[0])
        return float(self._between(self.curve(torch.tensor([t], dtype=torch.float64, device="cpu"))[0]))

    def gamma_and_weight(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """γ(t), and what half the squared error of ε counts in the bound: γ'(t), or T (e^(γ(t) − γ(t − 1/T)) − 1).

        float64 (N,) both; gradients flow to what the curve learns.
        """
        if self.timesteps is None:
            value, slope = self.curve(t)
            return self._between(value), (self.gamma_1 - self.gamma_0) * slope
        before = ((t * self.timesteps).round() - 1) / self.timesteps
        gamma, gamma_before = self._between(self.curve(torch.cat([t, before]))[0]).chunk(2)
        return gamma, self.timesteps * torch.expm1(gamma - gamma_before)

    def _between(self, value: Tensor) -> Tensor:
        return self.gamma_0 + (self.gamma_1 - self.gamma_0) * value

    def level(self, t: float) -> tuple[float, float]:
        """(α_t, σ_t); (1, 0) for clean data."""
        return (1.0, 0.0) if t == self.clean else _level(self.gamma(t))

    def level_told(self, time: float) -> tuple[float, float]:
        """(α, σ) of what the model is told, as `model_time` gives it."""
        return _level(self.gamma_0 + (self.gamma_1 - self.gamma_0) * time / MODEL_TIME)

    def alpha_bar(self, t: float) -> float:
        """α_t²; 1 for clean data."""
        return 1.0 if t == self.clean else _sigmoid(-self.gamma(t))

    def told(self, gamma: Tensor | float) -> Tensor | float:
        """What the model is told of a γ."""
        return MODEL_TIME * ((gamma - self.gamma_0) / (self.gamma_1 - self.gamma_0))

    def told_as(self, gamma: Tensor, like: Tensor) -> Tensor:
        """The same in the dtype of `like`, in float32 at least."""
        return self.told(gamma).to(torch.promote_types(torch.float32, like.dtype))

    def model_time(self, t: Tensor | float, x: Tensor) -> Tensor:
        """The model's time for the rows of x (N, …), (N,) in its dtype or float32, from t (N,) or one float for all."""
        if isinstance(t, Tensor):
            return self.told_as(self.gamma(t), x)
        exact = torch.promote_types(torch.float32, x.dtype)
        return time_of_all(self.told(self.gamma(t)), len(x), exact, x.device)

    def walk(self, steps: int, spacing: str | list[int] = "trailing") -> list[float]:
        """Falling times. trailing: 1, 1 − 1/S, …, 1/S, equal steps. edm: those of EDM's σ, which are e^(γ/2).

        edm goes from 1 to 0, or to 1/T, the first time of a chain.
        """
        if spacing == "edm":
            return self._edm_walk(steps)
        assert spacing == "trailing"
        return [1 - i / steps for i in range(steps)]

    def _edm_walk(self, steps: int) -> list[float]:
        """By halving: a curve can be learned, and only rises."""
        first = 0.0 if self.timesteps is None else 1 / self.timesteps
        sigmas = edm_sigmas(steps, math.exp(self.gamma(1.0) / 2), math.exp(self.gamma(first) / 2))
        wanted = 2 * torch.tensor(sigmas, dtype=torch.float64, device="cpu").log()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(54):  # to the last bit of 1
            middle = (low + high) / 2
            below = self._between(self.curve(middle)[0]) < wanted
            low, high = middle.where(below, low), high.where(below, middle)
        return [1.0, *high[1:-1].tolist(), *([first] if steps > 1 else [])]

    # -- noising, and what an output says ----------------------------------------------------------------------------

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """x_t in x_0's dtype; t is float64 (N,) or one float for all rows."""
        alpha, sigma = self.levels(self.gamma(t), x0)
        return alpha * x0 + sigma * noise

    def split(self, output: Tensor) -> tuple[Tensor, None]:
        """ε̂, and no variance channels."""
        return output, None

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """ε."""
        return noise

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """The output, in x_t's dtype."""
        return output.to(x_t.dtype)

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """The x̂_0 that the model's output at (x_t, t) stands for, in x_t's dtype."""
        alpha, sigma = self.levels(self.gamma(t), x_t)
        return (x_t - sigma * output.to(x_t.dtype)) / alpha

    def levels(self, gamma: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """(α, σ) of γ (N,), shaped and typed to multiply `like` (N, …), or of one as Python floats."""
        if not isinstance(gamma, Tensor):
            return _level(gamma)
        shape = -1, *[1] * (like.dim() - 1)
        alpha, sigma = (torch.sigmoid(one).sqrt() for one in (-gamma, gamma))
        return alpha.to(like.dtype).view(shape), sigma.to(like.dtype).view(shape)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _level(gamma: float) -> tuple[float, float]:
    return math.sqrt(_sigmoid(-gamma)), math.sqrt(_sigmoid(gamma))
