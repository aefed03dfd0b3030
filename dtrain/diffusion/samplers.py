"""From noise to images. Coefficients are float64; the state stays in the dtype it came in."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dtrain.diffusion.gaussian import GaussianDiffusion


@torch.no_grad()
def ddim(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    process: GaussianDiffusion,
    x_T: Tensor,
    timesteps: list[int],
    eta: float = 0.0,
    step_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """x_0 from x_T (N, C, H, W) along falling `timesteps` (Song et al. 2021, equations 12 and 16).

    The predecessor of a timestep is the next one *listed*, and before the last lies clean data with ᾱ = 1; taking
    t − T/S instead goes wrong whenever the spacing is uneven. η = 0 is deterministic, η = 1 is ancestral with β̃.

    denoiser(x_t, t int64 (N,)) is the model's output with labels and guidance already in it. step_noise(i) gives the
    standard normals, shaped as x_T, of the i-th step from 0; it is asked only for η > 0 and never for the last step.
    Raises ValueError for η > 0 without step_noise, or for an η whose noise exceeds what a step may hold.
    """
    if eta > 0 and step_noise is None:
        raise ValueError(f"eta = {eta} draws noise, so step_noise must be given")
    falling = sorted(set(timesteps), reverse=True)
    assert timesteps == falling
    assert 0 <= timesteps[-1] <= timesteps[0] < process.schedule.timesteps
    x = x_T
    for i, t in enumerate(timesteps):
        last = i + 1 == len(timesteps)
        alpha_bar_t = process.schedule.alpha_bar_at(t)
        alpha_bar_p = process.schedule.alpha_bar_at(-1 if last else timesteps[i + 1])
        variance = eta**2 * (1 - alpha_bar_p) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_p)
        direction = 1 - alpha_bar_p - variance
        if direction < -1e-12:  # rounding alone may put η = 1 a hair below 0 where ᾱ_t is tiny
            raise ValueError(
                f"eta = {eta} asks for more noise than x_{timesteps[i + 1]} holds; take an eta of at most 1"
            )

        output = denoiser(x, torch.full((len(x),), t, device=x.device))
        x0, eps = process.x0(output, x, t), process.eps(output, x, t)
        x = math.sqrt(alpha_bar_p) * x0 + math.sqrt(max(direction, 0.0)) * eps
        if eta > 0 and not last:
            x = x + math.sqrt(variance) * step_noise(i)
    return x
