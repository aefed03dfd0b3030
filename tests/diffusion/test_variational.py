"""Variational diffusion on data for which every term of its bound is known."""

import math

import numpy as np
import pytest
import torch

from dtrain.config import Variational
from dtrain.diffusion import variational_bound as bound
from dtrain.diffusion.likelihood import BITS
from dtrain.diffusion.process import build
from dtrain.diffusion.samplers import ancestral, ddim, encode, sample
from dtrain.diffusion.variational import VariationalDiffusion
from dtrain.models.layers import initialize
from dtrain.models.monotone import MonotoneCurve
from dtrain.objectives.variational import learned_curve
from tests.diffusion.gaussian_data import affine_std, closed_std, exact_eps, normals

STD = 0.4
GAMMA_0, GAMMA_1 = -13.3, 5.0
DENSITY = 0.5 * math.log(2 * math.pi * math.e * STD**2)  # the entropy of the data, nats: 0.50265
CHAIN = 0.5 * math.log((STD**2 * math.exp(-GAMMA_0) + 1) / (STD**2 * math.exp(-GAMMA_1) + 1))


def cubic(t):
    return 0.3 * t + 0.7 * t**3, 0.3 + 2.1 * t**2


def learned():
    """A curve with weights as a training may leave them."""
    network = MonotoneCurve()
    initialize(network, 0)
    rng = np.random.default_rng(7)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.from_numpy(rng.standard_normal(p.shape)))
    return learned_curve(network)


CURVES = {
    "linear": VariationalDiffusion(),
    "cubic": VariationalDiffusion(curve=cubic),
    "learned": VariationalDiffusion(curve=learned()),
}


def error(process, gamma):
    """E‖ε − ε̂‖² of the exact denoiser at γ (n,): ε̂ is linear in x_0 and ε, so a unit of each tells."""
    zero, one = torch.zeros(len(gamma), 1, 1, 1).double(), torch.ones(len(gamma), 1, 1, 1).double()
    alpha, sigma = process.levels(gamma, one)
    of_x0 = exact_eps(alpha * one + sigma * zero, alpha, sigma, 0.0, STD)
    of_noise = exact_eps(alpha * zero + sigma * one, alpha, sigma, 0.0, STD) - one
    return (STD**2 * of_x0**2 + of_noise**2).flatten()


def nodes(n):
    """Gauss and Legendre's on [0, 1]."""
    x, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(weights / 2)


@pytest.mark.parametrize("process", CURVES.values(), ids=CURVES)
def test_the_diffusion_term_is_the_closed_form_whatever_the_curve(process):
    t, share = nodes(2000)
    gamma, weight = process.gamma_and_weight(t)
    found = (share * 0.5 * weight * error(process, gamma)).sum()
    assert float(found) == pytest.approx(CHAIN, abs=1e-10)
    assert (float(gamma[0]), float(gamma[-1])) == pytest.approx((GAMMA_0, GAMMA_1), abs=1e-3)


def test_the_term_of_a_chain_falls_towards_that_of_continuous_time():
    found = []
    for timesteps in (10, 100, 1000, 10_000):
        process = VariationalDiffusion(timesteps=timesteps)
        t = process.time((torch.arange(timesteps).double() + 0.5) / timesteps)
        gamma, weight = process.gamma_and_weight(t)
        terms = 0.5 * weight * error(process, gamma) / timesteps
        before = np.linspace(GAMMA_0, GAMMA_1, timesteps + 1)
        by_snr = 0.5 * (np.exp(-before[:-1]) - np.exp(-before[1:])) * STD**2 / (1 + STD**2 * np.exp(-before[1:]))
        np.testing.assert_allclose(terms, by_snr, rtol=1e-9)  # ½ (SNR(s) − SNR(t)) E[Var(x_0 | x_t)]
        found.append(float(terms.sum()))
    assert [float(f"{one:.4g}") for one in found] == [15.09, 6.241, 5.781, 5.738]
    assert 0 < found[-1] - CHAIN < 0.006


def test_the_whole_bound_at_its_optimum_is_the_density_and_what_both_ends_leave_out():
    """Its excess is the KL of q(x_1) from N(0, 1), and of p(x_0 | x at t = 0) from the decoder."""
    process = VariationalDiffusion(decoder="continuous")
    x0, noise = torch.full((1, 1, 1, 1), STD).double(), torch.ones(1, 1, 1, 1).double()  # of the right second moments
    prior, decoder = (float(one) / BITS for one in (bound.prior(process, x0), bound.decoder(process, x0, noise)))
    of_end = 1 / (1 + math.exp(GAMMA_1)) * STD**2 + 1 / (1 + math.exp(-GAMMA_1))
    narrower = STD**2 / (STD**2 + math.exp(GAMMA_0))  # the exact posterior's variance, in the decoder's
    of_mean = (1 - narrower) ** 2 * (STD**2 + math.exp(GAMMA_0)) / math.exp(GAMMA_0)
    excess = 0.5 * (of_end - 1 - math.log(of_end)) + 0.5 * (narrower - 1 - math.log(narrower) + of_mean)
    assert prior + CHAIN + decoder == pytest.approx(DENSITY + excess, abs=1e-10)
    assert (round(prior + CHAIN + decoder, 6), round(DENSITY, 6)) == (0.502661, 0.502648)


LEVELS, SHARES = torch.tensor([3, 100, 101, 103, 120]), torch.tensor([0.1, 0.3, 0.25, 0.2, 0.15]).double()


def test_the_whole_bound_at_its_optimum_is_the_entropy_of_data_on_levels():
    """By quadrature over ε and γ, with E[x_0 | x_t] a sum over the levels that the data have."""
    process = VariationalDiffusion()
    data = (2 * LEVELS.double() / 255 - 1)[:, None, None, None]  # (5, 1, 1, 1)
    step = 0.05
    noise = torch.arange(-9, 9 + step / 2, step, dtype=torch.float64)[None, :, None, None]
    law = step * torch.exp(-0.5 * noise**2) / math.sqrt(2 * math.pi)
    law = SHARES[:, None, None, None] * law

    def shares(x_t, alpha, sigma):
        """p(level | x_t), the levels in front."""
        return (SHARES.log().view(-1, 1, 1, 1, 1) - 0.5 * ((x_t - alpha * data[:, None]) / sigma) ** 2).softmax(0)

    t, of_t = nodes(800)
    chain = 0.0
    for gamma, weight, share in zip(*process.gamma_and_weight(t), of_t, strict=True):
        alpha, sigma = process.levels(gamma.view(1), noise)
        x_t = alpha * data + sigma * noise
        clean = (shares(x_t, alpha, sigma) * data[:, None]).sum(0)
        chain += float(share * 0.5 * weight * (law * ((x_t - alpha * clean) / sigma - noise) ** 2).sum())
    rows = data.expand(-1, noise.shape[1], -1, -1)
    decoder = -float((law * bound.log_level(rows, noise.expand_as(rows), math.exp(GAMMA_0 / 2))).sum())
    prior = float((SHARES * bound.prior(process, data)).sum()) / BITS
    # Independently: what both ends leave out, by the laws of x at t = 1 and at t = 0.
    alpha, sigma = process.level(1.0)
    grid = torch.arange(-12, 12, 0.01, dtype=torch.float64)
    mixture = (SHARES[:, None] * torch.exp(-0.5 * ((grid - alpha * data[:, 0, 0]) / sigma) ** 2)).sum(0)
    mixture = mixture / (sigma * math.sqrt(2 * math.pi))
    normal = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
    at_end = float((mixture * (mixture / normal).log()).sum()) * 0.01
    (alpha, sigma), every = process.level(0.0), (2 * torch.arange(256).double() / 255 - 1).view(-1, 1, 1, 1, 1)
    x_t = alpha * data + sigma * noise
    flat = (-0.5 * ((x_t / alpha - every) / (sigma / alpha)) ** 2).log_softmax(0)[LEVELS]
    exact = shares(x_t, alpha, sigma)
    at_beginning = float((law * (exact * (exact.clamp(min=1e-300).log() - flat)).sum(0)).sum())
    entropy = -float((SHARES * SHARES.log()).sum())
    assert prior + chain + decoder == pytest.approx(entropy + at_end + at_beginning, abs=1e-10)
    assert prior + chain + decoder == pytest.approx(entropy, abs=0.01)


@pytest.mark.parametrize("deviation", [math.exp(GAMMA_0 / 2), 0.02, 0.5])
def test_the_decoder_is_the_softmax_over_all_256_levels(deviation):
    levels = torch.arange(256).double()
    own, noise = torch.tensor([0, 0, 1, 77, 128, 254, 255, 255]), 1.7 * normals(8, 40)
    x0 = (2 * own.double() / 255 - 1)[:, None].expand(-1, 40)
    logits = -0.5 * ((x0 + deviation * noise)[..., None] - (2 * levels / 255 - 1)).square() / deviation**2
    expected = logits.log_softmax(-1).gather(-1, own.view(-1, 1, 1).expand(-1, 40, 1))[..., 0]
    torch.testing.assert_close(bound.log_level(x0, noise, deviation), expected, rtol=1e-9, atol=1e-10)
    in_32 = bound.log_level(x0.float(), noise.float(), deviation)
    torch.testing.assert_close(in_32.double(), expected, rtol=1e-4, atol=1e-4)


def denoiser(process, watched=None):
    """Exact, at the γ that it is told."""

    def answer(x, t):
        gamma = process.gamma_0 + (process.gamma_1 - process.gamma_0) * t.double() / 1000
        alpha, sigma = process.levels(gamma, x)
        return exact_eps(x, alpha, sigma, 0.0, STD)

    return answer


@pytest.mark.parametrize("timesteps", [None, 10])
def test_the_sums_of_an_evaluation_are_the_bound(timesteps):
    process = VariationalDiffusion(timesteps=timesteps, decoder="continuous")
    n = 400
    x0 = STD * normals(n, 1, 4, 4, seed=1)
    u = torch.from_numpy(np.random.default_rng(2).random(n))
    noise = lambda i: normals(n, 1, 4, 4, seed=10 + i)  # noqa: E731
    parts = bound.sums(denoiser(process), process, x0, noise, u) / n / BITS
    prior, chain, decoder = parts.tolist()
    assert chain == pytest.approx(15.09 if timesteps else CHAIN, rel=0.005)
    assert prior == pytest.approx(float(bound.prior(process, x0).mean()) / BITS, abs=1e-12)
    assert decoder == pytest.approx(0.5 * (1 + math.log(2 * math.pi) + GAMMA_0), abs=0.02)


def test_a_clipped_bound_is_that_of_the_clipped_estimates():
    process, x0, noise = (
        VariationalDiffusion(timesteps=7),
        normals(3, 1, 2, 2).clamp(-1, 1),
        normals(3, 1, 2, 2, seed=1),
    )

    def wild(x, t):
        return 0.5 * x - 1

    expected = 0.0
    for i in range(1, 8):
        before, gamma = (GAMMA_0 + (GAMMA_1 - GAMMA_0) * j / 7 for j in (i - 1, i))
        alpha, sigma = math.sqrt(1 / (1 + math.exp(gamma))), math.sqrt(1 / (1 + math.exp(-gamma)))
        x_t = alpha * x0 + sigma * noise
        clean = ((x_t - sigma * wild(x_t, 0)) / alpha).clamp(-1, 1)
        snr = math.exp(-before) - math.exp(-gamma)
        expected += float((0.5 * snr * (clean - x0) ** 2).mean((1, 2, 3)).sum()) * BITS
    found = bound.sums(wild, process, x0, lambda i: noise, torch.zeros(3).double(), clip=True)
    assert float(found[1]) == pytest.approx(expected, rel=1e-9)
    assert float(bound.sums(wild, process, x0, lambda i: noise, torch.zeros(3).double())[1]) > 1.3 * expected


def exactly(process, walk):
    """Exact at the times of a walk that asks once a step, which no float32 has rounded."""
    places = iter(walk)

    def answer(x, t):
        alpha, sigma = process.level(next(places))
        return exact_eps(x, alpha, sigma, 0.0, STD)

    return answer


@pytest.mark.parametrize("process", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("steps", [1, 10, 200])
@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("ancestral", 1.0)])
def test_samplers_on_gaussian_data_have_the_closed_standard_deviation(process, steps, name, eta):
    walk = process.walk(steps)
    value = process.curve(torch.tensor(walk, dtype=torch.float64))[0].numpy()
    alpha_bar = 1 / (1 + np.exp(GAMMA_0 + (GAMMA_1 - GAMMA_0) * value))

    def added(a, p, last):
        variance = eta**2 * (1 - p) / (1 - a) * (1 - a / p)
        return variance, variance

    def drawn(x_T, step_noise):
        if name == "ancestral":
            return ancestral(exactly(process, walk), process, x_T, walk, step_noise)
        return ddim(exactly(process, walk), process, x_T, walk, eta, step_noise)

    found = affine_std(drawn, steps)
    assert found == pytest.approx(closed_std(range(steps), added, alpha_bar, STD), abs=1e-10)
    if steps == 200:
        assert found == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_3m", "unipc", "heun"])
def test_samplers_of_second_order_near_the_deviation_of_the_data(sampler):
    process = CURVES["cubic"]
    alpha, sigma = process.level(1.0)
    x_T = torch.tensor([0.0, math.sqrt(alpha**2 * STD**2 + sigma**2)]).double().view(2, 1, 1, 1)
    off = []
    for steps in (20, 80):
        zero, one = sample(denoiser(process), process, x_T, sampler, steps).flatten()
        assert float(zero) == 0
        off.append(abs(float(one) - STD))
    assert off[1] < off[0] / 8


def test_the_way_to_noise_and_back_errs_as_one_over_the_steps():
    process, x_0 = CURVES["cubic"], torch.tensor([0.3, -0.8]).double().view(2, 1, 1, 1)
    off = []
    for steps in (100, 400):
        walk = process.walk(steps)
        noise = encode(denoiser(process), process, x_0, walk)
        off.append(float((ddim(denoiser(process), process, noise, walk) - x_0).abs().max()))
    assert off[0] / off[1] == pytest.approx(4, rel=0.15)


def test_levels_times_and_what_the_model_is_told():
    process = build(Variational(process="vdm", gamma_min=-6.0, gamma_max=2.0, timesteps=4))
    assert process.snr_ends == (math.exp(6), math.exp(-2))
    assert process.time(torch.tensor([0.0, 0.24, 0.25, 0.9999]).double()).tolist() == [0.25, 0.25, 0.5, 1.0]
    alpha, sigma = process.level(0.25)
    assert (alpha**2 / sigma**2, alpha**2 + sigma**2) == pytest.approx((math.exp(4), 1.0), rel=1e-12)
    assert process.level_told(250.0) == pytest.approx((alpha, sigma), rel=1e-12)
    assert (process.level(-1.0), process.clean) == ((1.0, 0.0), -1.0)
    x0, noise, t = normals(3, 1, 2, 2), normals(3, 1, 2, 2, seed=1), torch.tensor([0.25, 0.5, 1.0]).double()
    x_t = process.noised(x0, noise, t)
    torch.testing.assert_close(x_t[:1], alpha * x0[:1] + sigma * noise[:1], rtol=0, atol=1e-14)
    torch.testing.assert_close(process.noised(x0, noise, 0.25)[:1], x_t[:1], rtol=0, atol=1e-14)
    torch.testing.assert_close(process.x0(noise, x_t, t), x0, rtol=0, atol=1e-13)
    assert process.model_time(t, x0).tolist() == process.model_time(t, x0.float()).tolist() == [250.0, 500.0, 1000.0]
    assert process.model_time(0.5, x0).tolist() == [500.0] * 3
    assert process.noised(x0.float(), noise.float(), t).dtype == torch.float32
