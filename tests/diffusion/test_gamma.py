"""Gamma noise against SciPy's law, its own moments and its exact posterior."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from dtrain.diffusion.gamma import GammaDiffusion, ancestral_gamma
from dtrain.diffusion.gamma_law import GammaLaw
from dtrain.diffusion.samplers import sample
from dtrain.diffusion.schedule import cosine, linear
from dtrain.errors import UserError
from dtrain.randomness import Draws, Purpose
from tests.devices import DEVICES
from tests.longer import mostly_longer

SHAPES = [1.0, 1.7, 5.0, 41.0, 100.0, 999.0, 1000.0, 1e5, 2.5e10]
N = 400_000


def normals(n, key=0):
    """Of generator 2, as a run draws them: float32 (n, 1, 1, 1)."""
    return torch.from_numpy(Draws(3, 2).normal(Purpose.NOISE, key, (n, 1, 1, 1)))


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_a_number_has_the_probability_of_the_normal_it_is_made_of(number):
    """Within 4.4 deviations, beyond which SciPy's function is wrong of large shapes; of others to 7."""
    k = SHAPES[number]
    end = 7.0 if k < 1000 else 4.4
    z = torch.linspace(-end, end, 2001, dtype=torch.float64)
    found = GammaLaw(torch.tensor(SHAPES, dtype=torch.float64)).standardised(z, number).numpy()
    z = z.numpy()
    true = np.where(z < 0, special.gammaincinv(k, special.ndtr(z)), special.gammainccinv(k, special.ndtr(-z)))
    np.testing.assert_allclose(found, (true - k) / np.sqrt(k), atol=1e-7 if k < 2 else 1e-8)
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_mean_variance_and_skewness_are_the_laws_by_quadrature(number):
    z = torch.linspace(-7, 7, 14001, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2) / (2 * np.pi) ** 0.5 / 1000
    noise = GammaLaw(torch.tensor(SHAPES, dtype=torch.float64)).standardised(z, number)
    moments = [float((weight * noise**power).sum()) for power in (1, 2, 3)]
    assert moments == pytest.approx([0, 1, 2 / SHAPES[number] ** 0.5], abs=1e-7)


def test_far_out_the_quantile_of_large_shapes_grows_as_the_law_says():
    """dε/dz is φ(z) over the density of ε, which needs no tail's integral."""
    k, h = 1e7, 1e-3
    z = torch.linspace(4.5, 6.9, 25, dtype=torch.float64)
    law = GammaLaw(torch.tensor([k]).double())
    for side in (z, -z):
        around = [law.standardised(side + step, 0) for step in (-h, 0, h)]
        slope = ((around[2] - around[0]) / (2 * h)).numpy()
        u = k + np.sqrt(k) * around[1].numpy()
        x = around[1].numpy() / np.sqrt(k)
        log_density = k * (np.log1p(x) - x) - np.log(u / k) - 0.5 * np.log(2 * np.pi) - 1 / (12 * k)  # of ε
        np.testing.assert_allclose(slope, np.exp(stats.norm.logpdf(side.numpy()) - log_density), rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_several_shapes_are_the_same_bits_on_every_device_and_in_any_company(device):
    law, z = GammaLaw(torch.tensor(SHAPES, dtype=torch.float64)), normals(1000).view(10, 1, 10, 10)
    numbers = torch.tensor([8, 0, 3, 1, 7, 2, 5, 4, 6, 8])
    found = law.standardised(z.to(device), numbers.to(device)).cpu()
    assert found.dtype == torch.float64
    for row, number in enumerate(numbers.tolist()):
        assert torch.equal(found[row : row + 1], law.standardised(z[row : row + 1], number))


@pytest.mark.parametrize("theta_0", [0.001, 0.009])
@pytest.mark.parametrize("t", [0, 20, 300, 999])
def test_states_have_the_mean_the_variance_and_the_skewness_of_the_paper(t, theta_0):
    process = GammaDiffusion(linear(1000), theta_0=theta_0)
    alpha_bar = float(process.schedule.alpha_bar[t])
    x0 = torch.full((N, 1, 1, 1), 0.4)
    noise = process.noise(normals(N), t)
    x_t = process.noised(x0, noise, torch.full((N,), t)).double().flatten().numpy()
    assert process.noised(x0[:3], noise[:3], t).dtype == torch.float32
    added = x_t - alpha_bar**0.5 * 0.4
    assert added.mean() == pytest.approx(0, abs=4 * ((1 - alpha_bar) / N) ** 0.5)
    assert added.var() == pytest.approx(1 - alpha_bar, rel=0.01)
    skewness = 2 * theta_0 * (alpha_bar / (1 - alpha_bar)) ** 0.5
    assert stats.skew(added) == pytest.approx(skewness, rel=0.01, abs=4 * (6 / N) ** 0.5)
    theta, shape = alpha_bar**0.5 * theta_0, (1 - alpha_bar) / (alpha_bar * theta_0**2)
    if shape < 1e6:  # SciPy's distribution function is good there
        assert stats.kstest(added, stats.gamma(shape, -shape * theta, theta).cdf).pvalue > 1e-3


def test_the_largest_state_is_subtracted_from_without_loss():
    """ᾱ = 4e-5: ḡ is 1.6e5 with deviation 1, so a float32 of it would be off by 0.01."""
    process, z = GammaDiffusion(linear(1000)), normals(2000)
    k, alpha_bar = float(process.shapes[-1]), float(process.schedule.alpha_bar[-1])
    assert k * alpha_bar**0.5 * 0.001 == pytest.approx(1.57e5, rel=0.01)
    expansion = z.double() + (z.double() ** 2 - 1) / (3 * k**0.5)
    torch.testing.assert_close(process.noise(z, 999), expansion, rtol=0, atol=1e-9)


def posterior_draws(process, t, p, u_t):
    """x_p of one ancestral step from known x_t, for a network that knows x_0 = 0.4; back in units of u."""
    theta_t, theta_p = (float(process.schedule.alpha[s]) * process.theta_0 for s in (t, p))
    x_t = float(process.schedule.alpha[t]) * 0.4 + theta_t * (u_t - float(process.shapes[t]))
    states = []

    def watched(x, time):
        states.append(x)
        return torch.full_like(x, 0.4)

    def draw(i):
        return normals(len(u_t), key=50 + i)

    ancestral_gamma(watched, process, x_t, [t, p], draw)
    return (states[1] - float(process.schedule.alpha[p]) * 0.4) / theta_p + float(process.shapes[p])


@pytest.mark.parametrize(("t", "p", "theta_0"), [(1, 0, 0.009), (40, 12, 0.009), (1, 0, 0.001)])
def test_a_step_draws_from_the_exact_posterior_of_its_stride(t, p, theta_0):
    process = GammaDiffusion(linear(1000), "x0", theta_0=theta_0)
    k_t, k_p = (float(process.shapes[s]) for s in (t, p))
    fixed = torch.full((N, 1, 1, 1), 1.3 * k_t, dtype=torch.float64)
    share = (posterior_draws(process, t, p, fixed) / fixed).flatten().numpy()
    beta = stats.beta(k_p, k_t - k_p)
    assert share.mean() == pytest.approx(beta.mean(), rel=0.001)
    assert share.var() == pytest.approx(beta.var(), rel=0.01)
    assert stats.kstest(share, beta.cdf).pvalue > 1e-3


def test_forwards_and_backwards_give_pairs_of_one_law():
    """u_p and an independent rest, or u_t and a share of it: equal means, variances, covariances and third moments."""
    process, t, p = GammaDiffusion(linear(1000), "x0", theta_0=0.009), 30, 8
    k_t, k_p = (float(process.shapes[s]) for s in (t, p))
    rng = np.random.default_rng(0)
    forwards = rng.gamma(k_p, size=N)
    forwards = np.stack([forwards, forwards + rng.gamma(k_t - k_p, size=N)])
    u_t = k_t + k_t**0.5 * process.noise(normals(N), t)
    backwards = torch.stack([posterior_draws(process, t, p, u_t), u_t]).view(2, N).numpy()
    means = [pair.mean(1) for pair in (forwards, backwards)]
    np.testing.assert_allclose(means[0], means[1], rtol=0.01)
    np.testing.assert_allclose(np.cov(forwards), np.cov(backwards), rtol=0.02)
    a, b = (pair - pair.mean(1, keepdims=True) for pair in (forwards, backwards))
    np.testing.assert_allclose((a[0] ** 2 * a[1]).mean(), (b[0] ** 2 * b[1]).mean(), rtol=0.05)


class OfTwoPoints:
    """The posterior mean of x_0 that is −0.5 or 0.5, known for gamma noise too."""

    def __init__(self, process):
        self.process = process

    def __call__(self, x, t):
        time = int(t[0])
        alpha, k = float(self.process.schedule.alpha[time]), float(self.process.shapes[time])
        u = [k + (x.double() - alpha * point) / (alpha * self.process.theta_0) for point in (-0.5, 0.5)]
        log = [torch.where(v > 0, (k - 1) * (v.clamp(min=1e-9) / k).log() - (v - k), -torch.inf) for v in u]
        return 0.5 * torch.tanh((log[1] - log[0]) / 2).nan_to_num().to(x.dtype)


@pytest.mark.parametrize("sampler", mostly_longer(["ancestral", "ddim"], ["ancestral"]))
def test_samples_of_an_exact_network_are_the_data(sampler):
    process = GammaDiffusion(linear(1000), "x0", theta_0=0.005)
    x_T = process.noise(normals(4000), 999).float()
    found = sample(OfTwoPoints(process), process, x_T, sampler, 200, step_noise=lambda i: normals(4000, key=100 + i))
    assert ((found.abs() - 0.5).abs() < 0.02).double().mean() > 0.98
    assert (found > 0).double().mean() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize(("schedule", "most"), [(linear(1000), 0.01), (cosine(1000), 0.0064)])
def test_a_theta_whose_law_has_a_pole_is_refused_with_the_largest_that_has_none(schedule, most):
    GammaDiffusion(schedule, theta_0=most * 0.99)
    with pytest.raises(UserError, match=rf"diffusion.theta_0 0.02 gives .* take at most {most:.2g}"):
        GammaDiffusion(schedule, theta_0=0.02)
