"""Deterministic walks along the probability-flow ODE, beyond DDIM, and the parts all samplers share.

A process is anything with level(t) → (α, σ), model_time, split, x0 and eps, and a `clean` time to walk to.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.diffusion.prediction import Apart, Partly

Denoiser = Callable[[Tensor, Tensor], Tensor | Apart | Partly]


def checked(process, timesteps: list) -> list:
    """The timesteps, if they fall strictly and end above the clean time."""
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[-1] > process.clean
    return timesteps


def predict(denoiser: Denoiser, process, x: Tensor, t, clip: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x̂_0, ε̂, variance channels or None) at x = x_t, in x's dtype.

    A clipped x̂_0 brings its own ε = (x − α x̂_0)/σ: keeping the old one would leave the level of noise (guided
    diffusion does so too, diffusers does not by default). Of answers apart ε̂ is the other one's and stays. Where x_0 is
    known, both are as of a network that knows it: any sampler then walks to it.
    """
    answer, part = denoiser(x, process.model_time(t, x)), None
    if isinstance(answer, Partly):
        answer, part = answer.answer, answer
    output, renoise = answer if isinstance(answer, Apart) else (answer, answer)
    _, channels = process.split(output)
    x0, eps = process.x0(output, x, t), process.eps(renoise, x, t)
    if clip:
        x0 = x0.clamp(-1, 1)
        if renoise is output:
            alpha, sigma = process.level(t)
            eps = (x - alpha * x0) / sigma
    if part is not None:
        alpha, sigma = process.level(t)
        x0, eps = x0.where(part.anew, part.x0), eps.where(part.anew, (x - alpha * part.x0) / sigma)
    return x0, eps, channels


def steps(process, timesteps: list):
    """(time, where it goes to) of every step."""
    return zip(checked(process, timesteps), [*timesteps[1:], process.clean], strict=True)


@torch.no_grad()
def dpmpp_2m(denoiser: Denoiser, process, x_T: Tensor, timesteps: list, clip: bool = False) -> Tensor:
    """x_0 from x_T by DPM-Solver++(2M): one evaluation a step, second order (Lu et al. 2022, algorithm 2).

    The first step and the one onto clean data, where log α/σ is infinite, are of first order, i.e. DDIM.
    """
    x, last_x0, last_h = x_T, None, None
    for t, p in steps(process, timesteps):
        (alpha_t, sigma_t), (alpha_p, sigma_p) = process.level(t), process.level(p)
        h = _log_ratio(alpha_p, sigma_p) - _log_ratio(alpha_t, sigma_t)
        x0, _, _ = predict(denoiser, process, x, t, clip)
        guess = x0
        if last_x0 is not None and math.isfinite(h):
            guess = x0 + h / (2 * last_h) * (x0 - last_x0)
        decay = sigma_p * alpha_t / (sigma_t * alpha_p)  # e^(−h), finite at both ends
        x = sigma_p / sigma_t * x + alpha_p * (1 - decay) * guess
        last_x0, last_h = x0, h
    return x


@torch.no_grad()
def dpmpp_3m(denoiser: Denoiser, process, x_T: Tensor, timesteps: list, clip: bool = False) -> Tensor:
    """x_0 from x_T by DPM-Solver++(3M): one evaluation a step, third order (Lu et al. 2022, appendix B).

    x̂_0 is the parabola in log α/σ through the last three, integrated exactly; the first two steps and the one onto
    clean data have fewer points.
    """
    x, last = x_T, []  # (x̂_0, step in log α/σ that it was taken with), the newest first
    for t, p in steps(process, timesteps):
        (alpha_t, sigma_t), (alpha_p, sigma_p) = process.level(t), process.level(p)
        h = _log_ratio(alpha_p, sigma_p) - _log_ratio(alpha_t, sigma_t)
        x0, _, _ = predict(denoiser, process, x, t, clip)
        decay = sigma_p * alpha_t / (sigma_t * alpha_p)  # e^(−h), finite at both ends
        x = sigma_p / sigma_t * x + alpha_p * (1 - decay) * x0
        known = [one for one in last if math.isfinite(one[1])]
        if known and math.isfinite(h):
            (before, h0), *further = known
            slope = (x0 - before) / h0
            if further:
                other, h1 = further[0]
                curve = (slope - (before - other) / h1) / (h0 + h1)
                slope = slope + h0 * curve
                x = x + alpha_p * (h**2 - 2 * (h - 1 + decay)) * curve
            x = x + alpha_p * (h - 1 + decay) * slope
        last = [(x0, h), *last[:1]]
    return x


@torch.no_grad()
def unipc(denoiser: Denoiser, process, x_T: Tensor, timesteps: list, clip: bool = False) -> Tensor:
    """x_0 from x_T by UniPC: one evaluation a step, third order (Zhao et al. 2023, UniPC-2 with B_2).

    A step is DPM-Solver++(2M)'s. Once x̂_0 at its end is known it is taken anew from where it began, by the parabola in
    log α/σ through that x̂_0 and the two before; the network is not asked again. Steps from pure noise and onto clean
    data, where log α/σ is infinite, are of first order.
    """
    x, begun, known = x_T, None, []  # begun: state and level before the last step; known: (log α/σ, x̂_0), newest first
    for t, p in steps(process, timesteps):
        here, (alpha_p, sigma_p) = process.level(t), process.level(p)
        x0, _, _ = predict(denoiser, process, x, t, clip)
        known = [(_log_ratio(*here), x0), *known[:2]]
        if begun is not None and math.isfinite(known[1][0]):
            x = _corrected(*begun, here, known)
        begun, guess = (x, here), x0
        h = _log_ratio(alpha_p, sigma_p) - known[0][0]
        if len(known) > 1 and math.isfinite(h):
            guess = x0 + h / (2 * (known[0][0] - known[1][0])) * (x0 - known[1][1])
        decay = sigma_p * here[0] / (here[1] * alpha_p)  # e^(−h), finite at both ends
        x = sigma_p / here[1] * x + alpha_p * (1 - decay) * guess
    return x


def _corrected(
    x: Tensor, begun: tuple[float, float], ended: tuple[float, float], known: list[tuple[float, Tensor]]
) -> Tensor:
    """The end of a step from x, between these levels (α, σ), by x̂_0 there, at its beginning and, if any, before."""
    (end, x0_end), (start, x0), *further = known
    h, (alpha, sigma) = end - start, ended
    decay, slope = math.exp(-h), (x0_end - x0) / h
    moved = sigma / begun[1] * x + alpha * (1 - decay) * x0
    if not further or not math.isfinite(further[0][0]):
        return moved + alpha * (1 - decay) / 2 * (x0_end - x0)
    before, x0_before = further[0]
    curve = (slope - (x0 - x0_before) / (start - before)) / (end - before)
    linear = h - 1 + decay
    return moved + alpha * (linear * (slope - h * curve) + (h**2 - 2 * linear) * curve)


def _log_ratio(alpha: float, sigma: float) -> float:
    """log α/σ, half the log SNR."""
    if alpha == 0 or sigma == 0:
        return -math.inf if alpha == 0 else math.inf
    return math.log(alpha) - math.log(sigma)


@torch.no_grad()
def heun(denoiser: Denoiser, process, x_T: Tensor, timesteps: list, clip: bool = False) -> Tensor:
    """x_0 from x_T by Heun's method on d(x/α)/d(σ/α) = ε: two evaluations a step (Karras et al. 2022, algorithm 1).

    The step onto clean data, and one from pure noise (α = 0, zero terminal SNR), are DDIM steps: σ/α or the model has
    no value at their other end.
    """
    x = x_T
    for t, p in steps(process, timesteps):
        x = _heun_step(denoiser, process, x, t, p, clip)
    return x


def _heun_step(denoiser: Denoiser, process, x: Tensor, t, p, clip: bool) -> Tensor:
    (alpha_t, sigma_t), (alpha_p, sigma_p) = process.level(t), process.level(p)
    x0, eps, _ = predict(denoiser, process, x, t, clip)
    ahead = alpha_p * x0 + sigma_p * eps
    if sigma_p == 0 or alpha_t == 0:
        return ahead
    _, eps_p, _ = predict(denoiser, process, ahead, p, clip)
    return alpha_p / alpha_t * x + (sigma_p - alpha_p * sigma_t / alpha_t) * (eps + eps_p) / 2


@dataclass(frozen=True)
class Churn:
    """New noise before each step with low ≤ σ ≤ high: S_churn, S_tmin, S_tmax and S_noise (Karras et al. 2022)."""

    amount: float
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0

    def added(self, sigma: float, steps: int) -> float:
        """γ, the share by which σ grows in one of so many steps."""
        return min(self.amount / steps, math.sqrt(2) - 1) if self.low <= sigma <= self.high else 0.0


@torch.no_grad()
def heun_churned(
    denoiser: Denoiser,
    process,
    x_T: Tensor,
    sigmas: list[float],
    step_noise: Callable[[int], Tensor],
    churn: Churn,
    clip: bool = False,
    of: int | None = None,
) -> Tensor:
    """x_0 from x_T by EDM's stochastic sampler, on a process whose times are σ (Karras et al. 2022, algorithm 2).

    of: the steps of the whole walk, where these are the last of them. It draws in its last step too, where σ_min lies
    within the churn's range.
    """
    x = x_T
    for i, (t, p) in enumerate(steps(process, sigmas)):
        if gamma := churn.added(t, of or len(sigmas)):
            raised = t * (1 + gamma)
            alpha_t, alpha_r = process.level(t)[0], process.level(raised)[0]
            x = alpha_r / alpha_t * x + alpha_r * math.sqrt(raised**2 - t**2) * churn.noise * step_noise(i)
            t = raised
        x = _heun_step(denoiser, process, x, t, p, clip)
    return x


@torch.no_grad()
def euler_flow(
    denoiser: Denoiser, process, x_T: Tensor, timesteps: list[float], clip: bool = False, apart: bool = False
) -> Tensor:
    """x_0 from x_T by Euler's method on dx/dt = velocity, t from 1 to 0.

    apart: x̂_0 and ε̂ are of two answers (`Apart`), so that no velocity leads to the next state: it is mixed of them.
    """
    x = x_T
    for t, p in steps(process, timesteps):
        x0, eps, _ = predict(denoiser, process, x, t, clip)
        x = (1 - p) * x0 + p * eps if apart else x + (p - t) * (eps - x0)
    return x


@torch.no_grad()
def heun_flow(denoiser: Denoiser, process, x_T: Tensor, timesteps: list[float], clip: bool = False) -> Tensor:
    """x_0 from x_T by Heun's method on dx/dt = velocity: two evaluations a step, one for the step onto clean data.

    The model was never shown t = 0, so its velocity there is not asked for.
    """
    x = x_T
    for t, p in steps(process, timesteps):
        x0, eps, _ = predict(denoiser, process, x, t, clip)
        velocity = eps - x0
        ahead = x + (p - t) * velocity
        if p > 0:
            x0, eps, _ = predict(denoiser, process, ahead, p, clip)
            ahead = x + (p - t) * (velocity + eps - x0) / 2
        x = ahead
    return x


NOISES = {"2t": lambda t: 2 * t, "t": lambda t: t, "sine": lambda t: math.sin(math.pi * t) ** 2}  # w(t) of an SDE
LAST = 0.04  # the time of the last step of an SDE, whose score has no bound towards clean data


def times_of_sde(steps: int) -> list[float]:
    """Falling times of so many steps: equal ones from 1 to LAST, and from there onto clean data."""
    return [1 - (1 - LAST) * i / (steps - 1) for i in range(steps)] if steps > 1 else [1.0]


@torch.no_grad()
def sde_flow(
    denoiser: Denoiser,
    process,
    x_T: Tensor,
    times: list[float],
    step_noise: Callable[[int], Tensor],
    clip: bool = False,
    noise: str = "2t",
) -> Tensor:
    """x_0 from x_T by Euler–Maruyama on dx = [v − ½ w s] dt + √w dW̄ with s = −ε/t, t from 1 to 0 (Ma et al. 2024, SiT).

    noise: which w(t) of NOISES; the marginals are the flow's own for each. The last step draws none: it is Euler's.
    """
    x = x_T
    for i, (t, p) in enumerate(steps(process, times)):
        x0, eps, _ = predict(denoiser, process, x, t, clip)
        w = 0.0 if p == process.clean else NOISES[noise](t)
        x = x + (p - t) * (eps - x0 + w / (2 * t) * eps)
        if w:
            x = x + math.sqrt(w * (t - p)) * step_noise(i)
    return x
