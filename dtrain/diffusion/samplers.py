"""From noise to images. Coefficients are float64; the state stays in the dtype it came in.

A sampler visits falling times of a process and ends on clean data (`process.clean`). The predecessor of a time is the
next one *listed*; taking t − T/S instead goes wrong whenever the spacing is uneven.

denoiser(x_t, t (N,)) is the model's output with labels and guidance already in it. step_noise(i) gives the standard
normals, shaped as x_T, of the i-th step from 0; it is asked only where noise is drawn, in the last step by churn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain import plugins
from dtrain.config import SAMPLERS
from dtrain.diffusion import resampled, solvers
from dtrain.diffusion.edm import EDM
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gamma import GammaDiffusion, ancestral_gamma
from dtrain.diffusion.gaussian import GaussianDiffusion, Reverse, variance_between
from dtrain.diffusion.mean_flow import MeanFlow, ahead, mean_flow
from dtrain.diffusion.process import Process
from dtrain.diffusion.solvers import Denoiser, checked, predict

StepNoise = Callable[[int], Tensor]


@dataclass(frozen=True)
class OwnSampler:
    """A sampler of a plug-in, as it is registered.

    walk(denoiser, process, x_T, times, clip, step_noise) → x_0; `solvers.steps(process, times)` has the steps and
    `solvers.predict` what an output stands for. processes: which of gaussian, flow, edm and vdm it walks. evaluations:
    how often it asks the denoiser in so many steps; None: once a step.
    """

    walk: Callable[..., Tensor]
    processes: tuple[str, ...] = ("gaussian", "flow")
    evaluations: Callable[[int], int] | None = None


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    process: Process,
    x_T: Tensor,
    sampler: str,
    steps: int,
    spacing: str | list[int] = "trailing",
    eta: float | str = 0.0,
    clip: bool = False,
    step_noise: StepNoise | None = None,
    sde_noise: str | None = None,
    renoise: str = "guided",
    churn: solvers.Churn | None = None,
    last: int | None = None,
    repeats: int = 1,
) -> Tensor:
    """x_0 from x_T (N, C, H, W) by the sampler a configuration names, in `steps` steps.

    sampler: one of `config.SAMPLERS` that walks this process, or a plug-in's. eta is ddim's alone, sde_noise the sde's,
    churn that of heun on EDM; clip holds every x̂_0 within [−1, 1], for pixels only. renoise: away where the denoiser
    gives `Apart` answers, to ddim and euler only. last: of the steps the last so many alone; x_T is then a state at the
    first of `times`. repeats: of each step, by `resampled` instead of the sampler where above 1. Raises UserError for
    steps that do not fit the process.
    """
    timesteps = times(process, sampler, steps, spacing, last)
    if repeats > 1:
        return resampled.resampled(denoiser, process, x_T, timesteps, step_noise, repeats, clip)
    if sampler not in SAMPLERS:
        return plugins.find("sampler", sampler).walk(denoiser, process, x_T, timesteps, clip, step_noise)
    if sampler == "sde":
        return solvers.sde_flow(denoiser, process, x_T, timesteps, step_noise, clip, sde_noise or "2t")
    if sampler == "lcm":
        return lcm(denoiser, process, x_T, timesteps, step_noise, clip)
    if isinstance(process, MeanFlow):
        return mean_flow(denoiser, process, x_T, timesteps)
    if isinstance(process, RectifiedFlow):
        if sampler == "euler":
            return solvers.euler_flow(denoiser, process, x_T, timesteps, clip, apart=renoise == "away")
        return solvers.heun_flow(denoiser, process, x_T, timesteps, clip)
    if churn is not None:
        return solvers.heun_churned(denoiser, process, x_T, timesteps, step_noise, churn, clip, steps)
    if sampler in ("ddim", "euler"):  # on y = x_0 + σ n Euler's step is DDIM's
        return ddim(denoiser, process, x_T, timesteps, eta, step_noise, clip)
    if sampler == "ancestral":
        if isinstance(process, GammaDiffusion):
            return ancestral_gamma(denoiser, process, x_T, timesteps, step_noise, clip)
        return ancestral(denoiser, process, x_T, timesteps, step_noise, clip)
    of_the_ode = {"heun": solvers.heun, "dpmpp_2m": solvers.dpmpp_2m, "dpmpp_3m": solvers.dpmpp_3m}
    of_the_ode["unipc"] = solvers.unipc
    return of_the_ode[sampler](denoiser, process, x_T, timesteps, clip)


def times(process: Process, sampler: str, steps: int, spacing: str | list[int], last: int | None = None) -> list:
    """The falling times that `sample` visits with these arguments."""
    found = solvers.times_of_sde(steps) if sampler == "sde" else process.walk(steps, spacing)
    return found if last is None else found[-last:]


def network_evaluations(
    process: Process,
    sampler: str,
    steps: int,
    spacing: str | list[int] = "trailing",
    last: int | None = None,
    repeats: int = 1,
) -> int:
    """How often `sample` with these arguments asks its denoiser."""
    walk = list(solvers.steps(process, times(process, sampler, steps, spacing, last)))
    if repeats > 1:
        return resampled.evaluations(len(walk), repeats)
    own = None if sampler in SAMPLERS else plugins.find("sampler", sampler)
    if own is not None and own.evaluations is not None:
        return own.evaluations(len(walk))
    if sampler != "heun":
        return len(walk)
    first = isinstance(process, RectifiedFlow)  # whose velocity has a value at pure noise
    return sum(1 + (p != process.clean and (first or process.level(t)[0] > 0)) for t, p in walk)


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    process: GaussianDiffusion | EDM,
    x_T: Tensor,
    timesteps: list[int],
    eta: float | str = 0.0,
    step_noise: StepNoise | None = None,
    clip: bool = False,
) -> Tensor:
    """x_0 from x_T (N, C, H, W) along falling `timesteps` (Song et al. 2021, equations 12 and 16).

    η = 0 is deterministic, η = 1 is ancestral with β̃. "sigma_hat" keeps η = 1 in the direction but draws noise with
    σ̂ = √(1 − ᾱ_t/ᾱ_p), the larger variance of DDPM (section 5, table 1).

    Raises ValueError for η > 0 without step_noise, or for an η whose noise exceeds what a step may hold.
    """
    larger = eta == "sigma_hat"
    eta = 1.0 if larger else eta
    if eta > 0 and step_noise is None:
        raise ValueError(f"eta = {eta} draws noise, so step_noise must be given")
    x = x_T
    for i, (t, p) in enumerate(solvers.steps(process, timesteps)):
        (alpha_t, sigma_t), (alpha_p, sigma_p) = process.level(t), process.level(p)
        beta = 1 - (alpha_t / alpha_p) ** 2
        variance = eta**2 * (sigma_p / sigma_t) ** 2 * beta
        direction = sigma_p**2 - variance
        if direction < -1e-12:  # rounding alone may put η = 1 a hair below 0 where ᾱ_t is tiny
            raise ValueError(f"eta = {eta} asks for more noise than the state at {p} holds; take an eta of at most 1")

        x0, eps, _ = predict(denoiser, process, x, t, clip)
        x = alpha_p * x0 + math.sqrt(max(direction, 0.0)) * eps
        if eta > 0 and p != process.clean:
            x = x + math.sqrt(beta if larger else variance) * step_noise(i)
    return x


@torch.no_grad()
def lcm(
    denoiser: Denoiser,
    process: GaussianDiffusion | RectifiedFlow,
    x_T: Tensor,
    timesteps: list[int] | list[float],
    step_noise: StepNoise,
    clip: bool = False,
) -> Tensor:
    """x_0 from x_T by a network that answers x_0 in one step: x_p = α_p x̂_0 + σ_p ε, ε new at each time but the last.

    The multistep sampler of consistency models (Song et al. 2023, algorithm 1; Luo et al. 2023, LCM). x̂_0 of a mean
    flow is its one step to 0. Only a network that leads each x_t to a sample, not to the mean of all that it may be,
    keeps the deviation of the data.
    """
    x = x_T
    for i, (t, p) in enumerate(solvers.steps(process, timesteps)):
        if isinstance(process, MeanFlow):
            x0 = ahead(denoiser, process, x, t, process.clean)
            x0 = x0.clamp(-1, 1) if clip else x0
        else:
            x0, _, _ = predict(denoiser, process, x, t, clip)
        alpha, sigma = process.level(p)
        x = x0 if p == process.clean else alpha * x0 + sigma * step_noise(i)
    return x


@torch.no_grad()
def encode(denoiser: Denoiser, process: Process, x_0: Tensor, timesteps: list[int] | list[float]) -> Tensor:
    """The x_T (N, C, H, W) that leads back to x_0 along the same falling `timesteps`.

    Deterministic DDIM backwards (Song et al. 2021, section 4.3), for EDM too; Euler's method backwards for a flow. Each
    step asks the network at the time it goes to, since clean data hold no noise. The error of a round trip falls as
    1/S.
    """
    x, here = x_0, process.clean
    for t in reversed(checked(process, timesteps)):
        from_clean = here == process.clean and process.clean_scale != 1
        x0, eps, _ = predict(denoiser, process, process.clean_scale * x if from_clean else x, t, clip=False)
        if isinstance(process, RectifiedFlow):
            x = x + (t - here) * (eps - x0)
        else:
            (alpha_h, sigma_h), (alpha_t, sigma_t) = process.level(here), process.level(t)
            x = alpha_t * (x - sigma_h * eps) / alpha_h + sigma_t * eps
        here = t
    return x


@torch.no_grad()
def ancestral(
    denoiser: Denoiser,
    process: GaussianDiffusion,
    x_T: Tensor,
    timesteps: list[int],
    step_noise: StepNoise,
    clip: bool = False,
) -> Tensor:
    """x_0 by drawing from p(x_p | x_t) with the process' variance, at any stride (Ho et al. 2020, algorithm 2)."""
    x = x_T
    for i, (t, p) in enumerate(solvers.steps(process, timesteps)):
        reverse = Reverse.between(process.alpha_bar(t), process.alpha_bar(p))
        x0, _, channels = predict(denoiser, process, x, t, clip)
        x = reverse.mean_x0 * x0 + reverse.mean_xt * x
        if p != process.clean:
            std = variance_between(process.variance, channels, reverse) ** 0.5
            x = x + std * step_noise(i)
    return x
