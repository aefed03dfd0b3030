"""Walks in which a part of x_0 is known, and walks that begin at a noised picture, by every sampler."""

import math
from itertools import pairwise

import pytest
import torch

from dtrain.diffusion.edm import EDM
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gamma import GammaDiffusion
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.prediction import Partly, target
from dtrain.diffusion.samplers import network_evaluations, sample, times
from dtrain.diffusion.schedule import linear
from dtrain.diffusion.solvers import Churn
from dtrain.diffusion.variational import VariationalDiffusion
from tests.diffusion.gaussian_data import MEAN, STD, affine_std, exact, normals

FLOW, DDPM, V = RectifiedFlow(), GaussianDiffusion(linear(1000)), GaussianDiffusion(linear(1000), "v")
WALKS = [
    (DDPM, "ddim", {}),
    (DDPM, "ddim", {"eta": 1.0}),
    (V, "ancestral", {}),
    (V, "dpmpp_2m", {}),
    (V, "dpmpp_3m", {}),
    (V, "unipc", {}),
    (DDPM, "heun", {}),
    (FLOW, "euler", {}),
    (FLOW, "heun", {}),
    (FLOW, "sde", {}),
    (DDPM, "lcm", {}),
    (FLOW, "lcm", {}),
    (EDM(), "heun", {}),
    (EDM(), "heun", {"churn": Churn(20.0)}),
    (GammaDiffusion(linear(1000), theta_0=0.005), "ancestral", {}),
    (VariationalDiffusion(), "ancestral", {}),
    (VariationalDiffusion(), "heun", {}),
]
STEPS = 8
ANEW = torch.tensor([True, False, False, True]).view(1, 1, 2, 2)
X_0, X_T = 0.4 * normals(5, 1, 2, 2, seed=1), normals(5, 1, 2, 2, seed=2)


def walked(process, sampler, how, denoiser, x_T=X_T, last=None):
    noise = lambda step: normals(*x_T.shape, seed=100 + step)  # noqa: E731
    return sample(denoiser, process, x_T, sampler, STEPS, step_noise=noise, last=last, **how)


def elementwise(process):
    """A network whose pixels do not see each other."""
    return lambda x, t: torch.tanh(x) + t.double().view(-1, 1, 1, 1) / 2000


@pytest.mark.parametrize(("process", "sampler", "how"), WALKS)
def test_what_is_known_is_walked_to_and_the_rest_is_as_without_it(process, sampler, how):
    plain = elementwise(process)
    found = walked(process, sampler, how, lambda x, t: Partly(plain(x, t), X_0, ANEW))
    alone = walked(process, sampler, how, plain)
    kept = ~ANEW.expand_as(X_0)
    torch.testing.assert_close(found[kept], X_0[kept], rtol=0, atol=1e-12)
    assert torch.equal(found[~kept], alone[~kept])


def correlated(process, covariance):
    """The exact denoiser of N(0, covariance) over the two pixels of (N, 1, 1, 2)."""

    def denoiser(x, t):
        alpha, sigma = process.level_told(t[0].item())
        whole = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        x_0 = (x.flatten(1) @ torch.linalg.solve(whole, alpha * covariance)).view_as(x)
        return target(process.prediction, x_0, (x - alpha * x_0) / sigma, alpha, sigma)

    return denoiser


@pytest.mark.parametrize(("process", "least"), [(FLOW, 0.9), (DDPM, 0.85)])
def test_the_more_often_steps_are_repeated_the_better_what_is_new_fits_the_rest(process, least):
    """Of two pixels with correlation 0.9 one is known: how much of its conditional mean the other one has."""
    share = 0.9
    denoiser = correlated(process, STD**2 * torch.tensor([[1.0, share], [share, 1.0]], dtype=torch.float64))
    known, anew = torch.full((4000, 1, 1, 2), 0.8).double(), torch.tensor([True, False]).view(1, 1, 1, 2)
    noise = lambda step: normals(*known.shape, seed=100 + step)  # noqa: E731
    sampler = "euler" if process is FLOW else "ancestral"
    gains = []
    for repeats in (1, 5):
        found = sample(lambda x, t: Partly(denoiser(x, t), known, anew), process, normals(*known.shape), sampler, 50,
                       step_noise=noise, repeats=repeats)  # fmt: skip
        assert torch.equal(found[..., 1], known[..., 1])
        gains.append(float(found[..., 0].mean()) / (share * 0.8))
    assert gains[0] < 0.7
    assert least < gains[1] < 1


@pytest.mark.parametrize("process", [FLOW, DDPM, EDM()])
@pytest.mark.parametrize("repeats", [2, 4])
def test_repeated_steps_leave_the_datas_own_deviation_the_more_steps_there_are(process, repeats):
    """Noising back is the forward process: where nothing is known it leaves the steps' own error, which 1/S bounds."""
    known = exact_edm(process) if isinstance(process, EDM) else exact(process)
    sampler, off, asked = {FLOW: "euler"}.get(process, "ddim"), [], []

    def counting(x, t):
        asked.append(t)
        return known(x, t)

    for steps in (50, 100, 200):
        asked.clear()
        std = affine_std(
            lambda x_T, noise, steps=steps: sample(
                counting, process, x_T, sampler, steps, step_noise=noise, repeats=repeats
            ),
            2 * repeats * steps,
        )
        off.append(STD - std)
        assert len(asked) == network_evaluations(process, sampler, steps, repeats=repeats) == (steps - 1) * repeats + 1
    for more, less in pairwise(off):
        assert 0.4 < less / more < 0.66
    assert off[-1] < 0.07 * STD


@pytest.mark.parametrize("last", [1, 3, 8])
@pytest.mark.parametrize(("process", "sampler", "how"), WALKS)
def test_a_walk_from_a_picture_is_the_end_of_the_whole_one(process, sampler, how, last):
    """Only where nothing is remembered of earlier steps, and no noise is counted from the first."""
    visited = times(process, sampler, STEPS, "trailing")
    counted = []

    def counting(x, t):
        counted.append(float(t[0]))
        return elementwise(process)(x, t)

    walked(process, sampler, how, counting, process.noised(X_0, X_T, visited[-last]), last)
    assert counted[0] == float(process.model_time(visited[-last], X_T)[0]) or "churn" in how
    assert len(counted) == network_evaluations(process, sampler, STEPS, "trailing", last) or "churn" in how


@pytest.mark.parametrize(("process", "sampler"), [(FLOW, "heun"), (EDM(), "heun"), (DDPM, "heun")])
def test_gaussian_data_begun_at_a_picture_keep_their_place_in_the_marginal(process, sampler):
    """The exact walk of N(m, s²) from x_t ends at m + s (x_t − α m)/√(α² s² + σ²)."""
    x_0, steps, last = MEAN + STD * normals(6, 1, 2, 2, seed=3), 400, 200
    first = times(process, sampler, steps, "trailing", last)[0]
    alpha, sigma = process.level(first)
    x_t = process.noised(x_0, normals(6, 1, 2, 2, seed=4), first)
    known = exact_edm(process) if isinstance(process, EDM) else exact(process)
    found = sample(known, process, x_t, sampler, steps, last=last)
    closed = MEAN + STD * (x_t - alpha * MEAN) / math.sqrt(alpha**2 * STD**2 + sigma**2)
    torch.testing.assert_close(found, closed, rtol=0, atol=2e-3)


def exact_edm(process):
    def denoiser(x, t):
        alpha, sigma = process.level_told(t[0].item())
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x_0 = MEAN + gain * (x - alpha * MEAN)
        return process.target(x_0, (x - alpha * x_0) / sigma, sigma / alpha)

    return denoiser
