"""The process of EDM: a network whose input and target have unit variance at every σ (Karras et al. 2022).

    y = x_0 + σ n,   D(y; σ) = c_skip y + c_out F(c_in y, c_noise),   loss = λ ‖D − x_0‖² = ‖F − target‖²

Samplers hold the network's own input, x = c_in y, in the place of y: x has unit variance, x_T is standard normal, and
what walks a Gaussian process walks this one. With tan φ = σ/σ_data it is x = cos φ · x_0/σ_data + sin φ · n, and F is
−v of x_0/σ_data.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.diffusion.schedule import edm_sigmas
from dtrain.diffusion.tables import time_of_all
from dtrain.randomness import LARGEST

TOLD = 1000  # what the model is told of sigma_max; sigma_min is 0


@dataclass(frozen=True, eq=False)
class EDM:
    """x_σ = c_in (x_0 + σ n), c_in = 1/√(σ² + σ_data²), and a network that predicts (x_0 − c_skip y)/c_out.

    A time is σ itself, a float; 0 is clean data, where x is x_0 without c_in. The model is told c_noise = ln σ/4, which
    is stretched so that σ_min is 0 and σ_max 1000: as it is, sines made for timesteps would not tell levels apart.

    sigma_data: the deviation of x_0. sigma_min, sigma_max, rho: of walks. noise_mean, noise_std: of ln σ in training.

    The trainer and the samplers use it as they use `GaussianDiffusion`; only the meaning of t differs.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    noise_mean: float = -1.2
    noise_std: float = 1.2

    prediction = "edm"
    clean = 0.0  # the time that samplers walk to
    last_time = TOLD

    @property
    def clean_scale(self) -> float:
        """lim c_in towards clean data, which x itself is without."""
        return 1 / self.sigma_data

    @property
    def snr_ends(self) -> tuple[float, float]:
        """1/σ² at both ends of the walk."""
        return self.sigma_min**-2, self.sigma_max**-2

    # -- levels ------------------------------------------------------------------------------------------------------

    def time(self, place: Tensor) -> Tensor:
        """σ, float64 (N,), whose logarithm is the normal's quantile of places float64 (N,) in [0, 1): monotone."""
        normal = torch.special.ndtri(place.clamp(min=1 - LARGEST))
        return (self.noise_mean + self.noise_std * normal).exp()

    def level(self, sigma: float) -> tuple[float, float]:
        """(c_in, c_in σ); (1, 0) for clean data."""
        if sigma == 0:
            return 1.0, 0.0
        size = math.hypot(sigma, self.sigma_data)
        return 1 / size, sigma / size

    def level_told(self, time: float) -> tuple[float, float]:
        """(α, σ) of what the model is told, as `model_time` gives it."""
        return self.level(self.sigma_min * math.exp(time / self._stretch))

    def model_time(self, t: Tensor | float, x: Tensor) -> Tensor:
        """1000 ln(σ/σ_min)/ln(σ_max/σ_min) for the rows of x (N, …), float32 (N,), from σ (N,) or one for all."""
        if isinstance(t, Tensor):
            return (self._stretch * (t.double() / self.sigma_min).log()).float()
        return time_of_all(self._stretch * math.log(t / self.sigma_min), len(x), torch.float32, x.device)

    @property
    def _stretch(self) -> float:
        return TOLD / math.log(self.sigma_max / self.sigma_min)

    def walk(self, steps: int, spacing: str | list[int] = "trailing") -> list[float]:
        """Falling σ from σ_max to σ_min, equal steps of σ^(1/ρ), the only spacing there is."""
        assert spacing == "trailing"
        return edm_sigmas(steps, self.sigma_max, self.sigma_min, self.rho)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """c_in (x_0 + σ n) in x_0's dtype; t is σ above 0, (N,) or one float for all rows."""
        cos, sin = self._angle(t, x0)
        return cos / self.sigma_data * x0 + sin * noise

    # -- what an output says -----------------------------------------------------------------------------------------

    def split(self, output: Tensor) -> tuple[Tensor, None]:
        """F, and no variance channels."""
        return output, None

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """(x_0 − c_skip y)/c_out, of unit variance at each σ where x_0 has deviation σ_data."""
        cos, sin = self._angle(t, x0)
        return sin / self.sigma_data * x0 - cos * noise

    def error(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """√λ (D − x_0), whose square the loss is."""
        return output - self.target(x0, noise, t)

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """D = c_skip y + c_out F, in x_t's dtype."""
        cos, sin = self._angle(t, x_t)
        return self.sigma_data * (cos * x_t + sin * output.to(x_t.dtype))

    def eps(self, output: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """(y − D)/σ, in x_t's dtype."""
        cos, sin = self._angle(t, x_t)
        return sin * x_t - cos * output.to(x_t.dtype)

    def _angle(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """cos φ = √c_skip and sin φ, tan φ = σ/σ_data: (N, 1, …) in like's dtype, or floats when t is one."""
        if not isinstance(t, Tensor):
            size = math.hypot(t, self.sigma_data)
            return self.sigma_data / size, t / size
        t = t.double().view(-1, *[1] * (like.dim() - 1))
        size = torch.hypot(t, torch.full_like(t, self.sigma_data))
        return (self.sigma_data / size).to(like.dtype), (t / size).to(like.dtype)
