"""Samplers and the bound on data N(0.3, 0.5²) with the exact network, against closed forms."""

import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch

from dtrain.diffusion import likelihood
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.samplers import ancestral, ddim, encode, sample
from dtrain.diffusion.schedule import cosine, linear, subsequence, with_zero_terminal_snr
from tests.diffusion.gaussian_data import ALPHA_BAR, MEAN, STD, affine_std, closed_std, exact, normals

process = GaussianDiffusion(linear(1000))
NATS = math.log(2)


def beta_tilde(a, p, last):
    variance = (1 - p) / (1 - a) * (1 - a / p)
    return variance, 0.0 if last else variance


def with_eta(eta):
    return lambda a, p, last: tuple(eta**2 * v for v in beta_tilde(a, p, last))


def larger_noise(a, p, last):
    return beta_tilde(a, p, last)[0], 0.0 if last else 1 - a / p


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 1.0, "sigma_hat"])
def test_the_table_of_steps_and_eta_has_its_closed_form(steps, eta):
    timesteps = subsequence(1000, steps, "quad")
    added = larger_noise if eta == "sigma_hat" else with_eta(eta)
    std = affine_std(lambda x_T, noise: ddim(exact(process), process, x_T, timesteps, eta, noise), steps)
    assert std == pytest.approx(closed_std(timesteps, added), abs=1e-10)


@pytest.mark.parametrize(("variance", "std"), [("fixed_large", 0.50075), ("fixed_small", 0.49611)])
def test_ancestral_sampling_in_a_thousand_steps_has_the_known_standard_deviation(variance, std):
    p = GaussianDiffusion(linear(1000), variance=variance)
    timesteps = subsequence(1000, 1000, "leading")
    found = affine_std(lambda x_T, noise: ancestral(exact(p), p, x_T, timesteps, noise), 1000)
    assert round(found, 5) == std
    added = beta_tilde if variance == "fixed_small" else larger_noise
    assert found == pytest.approx(closed_std(timesteps, added), abs=1e-10)


def with_variance(p, channels):
    """The exact network with variance channels: channels(t) → float."""
    return lambda x, t: torch.cat([exact(p)(x, t), torch.full_like(x, channels(int(t[0])))], dim=1)


@pytest.mark.parametrize(("extreme", "twin"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_a_learned_range_at_its_ends_is_the_fixed_variances(extreme, twin):
    learned = GaussianDiffusion(linear(1000), variance="learned_range")
    fixed = GaussianDiffusion(linear(1000), variance=twin)
    x_T, timesteps = normals(3, 1, 2, 2), subsequence(1000, 30, "trailing")
    draws = [ancestral(d, p, x_T, timesteps, lambda i: normals(3, 1, 2, 2, seed=i))
             for d, p in [(with_variance(learned, lambda t: extreme), learned), (exact(fixed), fixed)]]  # fmt: skip
    torch.testing.assert_close(*draws, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("schedule", [linear(1000), cosine(1000)], ids=["linear", "cosine"])
def test_every_prediction_gives_the_same_samples(prediction, schedule):
    eps, other = GaussianDiffusion(schedule), GaussianDiffusion(schedule, prediction)
    x_T, timesteps = normals(3, 1, 2, 2), subsequence(1000, 25, "trailing")
    expected = ddim(exact(eps), eps, x_T, timesteps)
    torch.testing.assert_close(ddim(exact(other), other, x_T, timesteps), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "dpmpp_2m", "dpmpp_3m", "unipc", "heun"])
def test_with_zero_terminal_snr_every_sampler_starts_from_pure_noise_and_reaches_the_data(sampler):
    p = GaussianDiffusion(with_zero_terminal_snr(linear(1000)), "v")
    std = affine_std(lambda x_T, noise: sample(exact(p), p, x_T, sampler, 200, step_noise=noise), 200)
    assert std == pytest.approx(STD, abs=0.02)
    zero = torch.zeros(1, 1, 1, 1).double()
    mean = sample(exact(p), p, zero, sampler, 200, "trailing", step_noise=lambda i: zero)
    assert float(mean) == pytest.approx(MEAN, abs=1e-10)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quad"])
def test_encoding_and_decoding_returns_to_the_image_as_the_steps_grow(spacing):
    x_0 = MEAN + STD * normals(4, 1, 2, 2)
    errors = []
    for steps in (10, 50, 250, 1000):
        timesteps = subsequence(1000, steps, spacing)
        x_T = encode(exact(process), process, x_0, timesteps)
        errors.append(float((ddim(exact(process), process, x_T, timesteps) - x_0).abs().max()))
    assert all(after < 0.4 * before for before, after in pairwise(errors)), errors
    assert errors[-1] < 5e-3


def test_encoding_on_gaussian_data_is_the_closed_product():
    timesteps = subsequence(1000, 20, "leading")
    zero, one = encode(exact(process), process, torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1), timesteps).flatten()
    slope, here = 1.0, 1.0
    for t in reversed(timesteps):
        there = ALPHA_BAR[t]
        k = math.sqrt(1 - there) / (there * STD**2 + 1 - there)  # dε/dx at the level gone to
        slope *= math.sqrt(there / here) * (1 - math.sqrt(1 - here) * k) + math.sqrt(1 - there) * k
        here = there
    assert float(one - zero) == pytest.approx(slope, abs=1e-10)


# -- the bound ------------------------------------------------------------------------------------------------------

ENTROPY = 0.5 * math.log(2 * math.pi * math.e * STD**2)


def two_point_rows():
    """x_0 and ε of four rows whose every average of a quadratic form is that of the normals: (±1, ±1)."""
    sign = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    return MEAN + STD * sign[:, 0].view(4, 1, 1, 1), sign[:, 1].view(4, 1, 1, 1)


def bound(p, denoiser):
    """(L_T, the curve of L_t), nats per dimension, exact expectations over N(m, s²)."""
    x0, noise = two_point_rows()
    curve = likelihood.curve(denoiser, p, x0, lambda t: noise)
    return float(likelihood.prior(p, x0).mean()) * NATS, curve.mean(1) * NATS


def optimal_channels(p):
    """The variance channel at which p(x_{t−1} | x_t) has the variance of the true q(x_{t−1} | x_t)."""
    channels = []
    for t in range(1000):
        a, previous = ALPHA_BAR[t], ALPHA_BAR[t - 1] if t else 1.0
        marginal_p, marginal_t = previous * STD**2 + 1 - previous, a * STD**2 + 1 - a
        variance = marginal_p - a / previous * marginal_p**2 / marginal_t
        small, large = float(p.log_beta_tilde[t]), float(p.log_beta[t])
        channels.append(2 * (math.log(variance) - small) / (large - small) - 1)
    return channels


def test_the_bound_at_the_optimal_variance_is_the_entropy_and_what_the_noise_still_knows():
    p = GaussianDiffusion(linear(1000), variance="learned_range", decoder="continuous")
    channels = optimal_channels(p)
    prior, curve = bound(p, with_variance(p, lambda t: channels[t]))
    a = mpmath.mpf(1)
    for i in range(1000):
        a *= 1 - (mpmath.mpf("1e-4") + (mpmath.mpf("0.02") - mpmath.mpf("1e-4")) * i / 999)
    mean, variance = mpmath.sqrt(a) * MEAN, a * STD**2 + 1 - a
    marginal = (variance + mean**2 - 1 - mpmath.log(variance)) / 2
    assert prior + float(curve.sum()) == pytest.approx(ENTROPY + float(marginal), abs=1e-10)
    assert prior + float(curve.sum()) == pytest.approx(0.7257931689972, abs=1e-10)
    assert float(curve[1:].min()) > 0


@pytest.mark.parametrize(("variance", "nats"), [("fixed_large", 0.84046), ("fixed_small", 1.29572)])
def test_fixed_variances_cost_the_known_nats(variance, nats):
    p = GaussianDiffusion(linear(1000), variance=variance, decoder="continuous")
    prior, curve = bound(p, exact(p))
    assert round(prior + float(curve.sum()), 5) == nats


def test_each_term_is_the_kl_of_two_gaussians():
    p = GaussianDiffusion(linear(1000), "v", variance="fixed_large")
    x0, noise, t = normals(5, 2, 3, 3) * 0.3, normals(5, 2, 3, 3, seed=1), torch.tensor([1, 2, 100, 500, 999])
    x_t, output = p.noised(x0, noise, t), normals(5, 2, 3, 3, seed=2)
    terms = likelihood.term(p, output, x0, x_t, t)
    beta = np.linspace(1e-4, 0.02, 1000)
    for row, i in enumerate(t.tolist()):
        a, previous = ALPHA_BAR[i], ALPHA_BAR[i - 1]

        def mean(x_0, i=i, a=a, previous=previous, row=row):
            return (math.sqrt(previous) * beta[i] * x_0 + math.sqrt(1 - beta[i]) * (1 - previous) * x_t[row]) / (1 - a)

        x0_hat = math.sqrt(a) * x_t[row] - math.sqrt(1 - a) * output[row]
        q = torch.distributions.Normal(mean(x0[row]), math.sqrt((1 - previous) / (1 - a) * beta[i]))
        ours = torch.distributions.Normal(mean(x0_hat), math.sqrt(beta[i]))
        expected = torch.distributions.kl_divergence(q, ours).mean() / NATS
        assert float(terms[row]) == pytest.approx(float(expected), rel=1e-9)


def test_with_a_fixed_variance_a_term_is_the_weighted_error_of_eps():
    """L_t = β²/(2σ²α(1 − ᾱ)) ‖ε − ε_θ‖² + C, with C = 0 for σ² = β̃."""
    p = GaussianDiffusion(linear(1000))
    x0, noise, t = normals(3, 1, 2, 2), normals(3, 1, 2, 2, seed=1), torch.tensor([1, 300, 999])
    x_t, output = p.noised(x0, noise, t), normals(3, 1, 2, 2, seed=2)
    terms = likelihood.term(p, output, x0, x_t, t) * NATS
    beta = np.linspace(1e-4, 0.02, 1000)
    for row, i in enumerate(t.tolist()):
        small = (1 - ALPHA_BAR[i - 1]) / (1 - ALPHA_BAR[i]) * beta[i]
        weight = beta[i] ** 2 / (2 * small * (1 - beta[i]) * (1 - ALPHA_BAR[i]))
        expected = weight * float((noise[row] - output[row]).square().mean())
        assert float(terms[row]) == pytest.approx(expected, rel=1e-9)


def test_the_prior_term_is_the_kl_to_the_standard_normal():
    x0 = normals(3, 1, 2, 2)
    a = ALPHA_BAR[-1]
    q = torch.distributions.Normal(math.sqrt(a) * x0, math.sqrt(1 - a))
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(1) / NATS
    torch.testing.assert_close(likelihood.prior(process, x0), kl, rtol=1e-9, atol=1e-12)


# -- the discretised decoder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.003, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("mean", [-1.2, -0.999, 0.0, 0.3, 1.0])
def test_the_masses_of_all_256_bins_sum_to_one(mean, std):
    x0 = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_mass = likelihood.log_mass(x0, torch.full_like(x0, mean), torch.full_like(x0, 2 * math.log(std)))
    assert float(log_mass.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_a_bins_mass_is_exact_even_far_in_a_tail():
    mpmath.mp.dps = 60
    for pixel, mean, std in [(0, -0.9, 0.01), (255, 0.2, 0.05), (128, 0.004, 0.0074), (200, -1, 0.03), (3, 0.9, 0.05)]:
        x = mpmath.mpf(pixel) / mpmath.mpf("127.5") - 1
        low = mpmath.mpf("-inf") if pixel == 0 else (x - mpmath.mpf(1) / 255 - mpmath.mpf(mean)) / mpmath.mpf(std)
        high = mpmath.mpf("inf") if pixel == 255 else (x + mpmath.mpf(1) / 255 - mpmath.mpf(mean)) / mpmath.mpf(std)
        upper_tail = low > 0
        cdf = (lambda v: mpmath.erfc(v / mpmath.sqrt(2)) / 2) if upper_tail else (lambda v: mpmath.ncdf(v))
        expected = mpmath.log(cdf(low) - cdf(high) if upper_tail else cdf(high) - cdf(low))
        x0, m, v = (torch.tensor([float(a)], dtype=torch.float64) for a in (x, mean, 2 * math.log(std)))
        assert float(likelihood.log_mass(x0, m, v)) == pytest.approx(float(expected), rel=1e-9)
        single = likelihood.log_mass(x0.float(), m.float(), v.float())
        assert float(single) == pytest.approx(float(expected), rel=2e-3)


@pytest.mark.parametrize("std", [0.796, 0.798, 3.0, 1000.0, math.exp(12)])  # bins are thin from 0.797 on
@pytest.mark.parametrize("mean", [0.0, -2.0, 40.0])
def test_bins_much_narrower_than_the_deviation_have_their_mass_and_its_gradient_in_fp32(std, mean):
    mpmath.mp.dps = 60

    def mass(mu, spread):
        z = [
            (mpmath.mpf(76.5) / 127.5 - 1 + side * mpmath.mpf(1) / 255 - mu) / mpmath.exp(spread / 2)
            for side in (-1, 1)
        ]
        if z[0] > 0:
            z = [-z[1], -z[0]]
        return mpmath.log((mpmath.erfc(-z[1] / mpmath.sqrt(2)) - mpmath.erfc(-z[0] / mpmath.sqrt(2))) / 2)

    given = mpmath.mpf(mean), 2 * mpmath.log(std)
    m, v = (torch.tensor([float(value)], requires_grad=True) for value in given)
    found = likelihood.log_mass(torch.tensor([76.5 / 127.5 - 1]), m, v)
    found.sum().backward()
    slopes = [float(mpmath.diff(mass, given, order)) for order in ((1, 0), (0, 1))]
    assert found.item() == pytest.approx(float(mass(*given)), rel=1e-4, abs=1e-4)
    assert [float(m.grad), float(v.grad)] == pytest.approx(slopes, rel=0.01, abs=2e-3)


def test_the_decoder_term_uses_bins_and_its_gradient_is_finite_everywhere():
    x0 = (torch.arange(256, dtype=torch.float32) / 127.5 - 1).view(1, 1, 16, 16)
    for offset in (0.0, 1e-3, 5.0, -5.0):
        mean = (x0 + offset).requires_grad_()
        log_variance = torch.tensor(math.log(5.45e-5)).requires_grad_()
        likelihood.log_mass(x0, mean, log_variance).sum().backward()
        assert torch.isfinite(mean.grad).all()
        assert torch.isfinite(log_variance.grad)
    t = torch.zeros(1, dtype=torch.long)
    x_t = process.noised(x0, torch.ones_like(x0), t)
    found = likelihood.term(process, torch.ones_like(x0), x0, x_t, t)
    expected = -likelihood.log_mass(x0, x0, process.log_beta_tilde[0].float()).mean() / NATS
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_clipping_holds_the_estimate_where_pixels_live():
    x0, t = torch.ones(1, 1, 2, 2).double(), torch.tensor([500])
    p = GaussianDiffusion(linear(1000), "x0")
    x_t = p.noised(x0, torch.zeros_like(x0), t)
    assert float(likelihood.term(p, 3 * x0, x0, x_t, t, clip=True)) == pytest.approx(0, abs=1e-12)
    assert float(likelihood.term(p, 3 * x0, x0, x_t, t)) > 0
