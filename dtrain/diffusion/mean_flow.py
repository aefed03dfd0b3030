"""MeanFlow: a network of the mean velocity between two times, so that one step spans a path (Geng et al. 2025).

u(x_t, r, t) = 1/(t − r) ∫_r^t v(x_s, s) ds,   x_r = x_t − (t − r) u(x_t, r, t),   u(x_t, t, t) = v(x_t, t)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.diffusion import solvers
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.prediction import Partly
from dtrain.diffusion.solvers import Denoiser


@dataclass(frozen=True, eq=False)
class MeanFlow(RectifiedFlow):
    """The path of `RectifiedFlow`, and a network that is told t and t − r. Asked for one time it is told a span of 0,
    and answers the velocity.
    """

    def told(self, t: Tensor, r: Tensor) -> Tensor:
        """What the model is told, float32 (N, 2), of times float64 (N,)."""
        return (self.time_scale * torch.stack([t, t - r], dim=1)).float()

    def model_time(self, t: Tensor | float, x: Tensor) -> Tensor:
        """float32 (N, 2) for the rows of x (N, …), of a span of 0."""
        times = t.double() if isinstance(t, Tensor) else torch.full((len(x),), t, dtype=torch.float64, device=x.device)
        return self.told(times, times)


@torch.no_grad()
def mean_flow(denoiser: Denoiser, process: MeanFlow, x_T: Tensor, timesteps: list[float]) -> Tensor:
    """x_0 from x_T: x_r = x_t − (t − r) u(x_t, r, t) from each time to the next, the last of them 0."""
    x = x_T
    for t, p in solvers.steps(process, timesteps):
        x = ahead(denoiser, process, x, t, p)
    return x


def ahead(denoiser: Denoiser, process: MeanFlow, x: Tensor, t: float, p: float) -> Tensor:
    """x_p of x = x_t (N, C, H, W), in one step. Where x_0 is known it lies on the straight way to it."""
    here, there = (torch.full((len(x),), at, dtype=torch.float64, device=x.device) for at in (t, p))
    answer = denoiser(x, process.told(here, there))
    if isinstance(answer, Partly):
        drawn = x - (t - p) * answer.answer.to(x.dtype)
        return drawn.where(answer.anew, x + (t - p) / t * (answer.x0 - x))
    return x - (t - p) * answer.to(x.dtype)
