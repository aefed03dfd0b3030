"""How straight a flow's paths are: what a walk of few steps loses (Liu et al. 2023, section 2.2)."""

import torch
from torch import Tensor

from dtrain.diffusion import solvers
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.solvers import Denoiser, predict


@torch.no_grad()
def straightness(denoiser: Denoiser, process: RectifiedFlow, x_T: Tensor, steps: int) -> Tensor:
    """∫_0^1 ‖dx/dt − (x_1 − x_0)‖² dt along Euler's walk from each row of x_T, its mean over C, H, W: float64 (N,).

    0 where a single step draws what many do. As x_1 − x_0 is the mean of the steps' velocities, it is the mean of their
    squares less its own.
    """
    x, squares = x_T.double(), torch.zeros(len(x_T), dtype=torch.float64, device=x_T.device)
    for t, p in solvers.steps(process, process.walk(steps)):
        x0, eps, _ = predict(denoiser, process, x.to(x_T.dtype), t, clip=False)
        velocity = (eps - x0).double()
        squares += (t - p) * velocity.square().flatten(1).mean(1)
        x = x + (p - t) * velocity
    return squares - (x_T.double() - x).square().flatten(1).mean(1)
