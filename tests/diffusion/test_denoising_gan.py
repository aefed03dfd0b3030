"""A denoising GAN's chain on Gaussian data, exactly: each state is a vector of coefficients of independent normals."""

import math

import pytest
import torch

from dtrain.diffusion.denoising_gan import DenoisingGAN, chain_of
from dtrain.diffusion.samplers import network_evaluations, sample

S, MANY = 0.4, 24  # the data's deviation; the independent normals that there may be


def normal(number, scale=1.0):
    """A state (1, MANY, 1, 1) that is one of them, or a multiple of it."""
    return scale * torch.eye(MANY, dtype=torch.float64)[number].view(1, MANY, 1, 1)


def covariance(a, b):
    return (a * b).sum().item()


@pytest.mark.parametrize("timesteps", [1, 2, 4, 8])
def test_the_chain_ends_in_noise(timesteps):
    schedule = chain_of(timesteps)
    assert len(schedule.alpha_bar) == timesteps
    if timesteps == 1:
        assert schedule.alpha_bar[0] == 0  # a GAN's network sees noise alone
    else:
        assert schedule.alpha_bar[-1].item() == pytest.approx(math.exp(-10.05), rel=1e-12)  # of the whole process


def test_its_betas_are_the_published_ones():
    assert chain_of(4).beta.tolist() == pytest.approx([0.4763, 0.8490, 0.9565, 0.9875], abs=5e-5)


@pytest.mark.parametrize("timesteps", [1, 2, 4])
def test_two_neighbouring_states_have_the_chains_own_law(timesteps):
    process = DenoisingGAN(chain_of(timesteps))
    x0, noise, step_noise = (normal(i) for i in range(3))
    for t in range(timesteps):
        before, x_t = process.pair(x0, noise, step_noise, torch.tensor([t]))
        alpha, sigma = process.level(t)
        alpha_p, _ = process.level(t - 1)
        beta = 1 - alpha**2 / alpha_p**2
        found = [covariance(before, x0), covariance(before, before), covariance(x_t, x0), covariance(x_t, x_t)]
        assert found == pytest.approx([alpha_p, 1.0, alpha, alpha**2 + sigma**2], abs=1e-12)
        assert covariance(before, x_t) == pytest.approx(math.sqrt(1 - beta), abs=1e-12)


@pytest.mark.parametrize("timesteps", [1, 2, 4])
def test_the_reverse_step_gives_back_what_was_there(timesteps):
    """(x_{t−1}, x_t, x_0) of `pair`, and of `reverse` of that x_t and x_0, are jointly normal with one covariance."""
    process = DenoisingGAN(chain_of(timesteps))
    x0, noise, step_noise, anew = (normal(i) for i in range(4))
    for t in range(timesteps):
        before, x_t = process.pair(x0, noise, step_noise, torch.tensor([t]))
        again = process.reverse(x0, x_t, anew, torch.tensor([t]))
        for other in (x0, x_t):
            assert covariance(again, other) == pytest.approx(covariance(before, other), abs=1e-12)
        assert covariance(again, again) == pytest.approx(covariance(before, before), abs=1e-12)


def deviation_of_samples(timesteps, draws):
    """Of data N(0, S²) after the whole chain, its network drawing from p(x_0 | x_t), or giving the mean of it."""
    process = DenoisingGAN(chain_of(timesteps))
    unused = iter(range(timesteps + 1, MANY))

    def network(x_t, told):
        alpha, sigma = process.level(int(told[0]))
        total = alpha**2 * S**2 + sigma**2
        mean = alpha * S**2 / total * x_t
        return mean + normal(next(unused), S * sigma / math.sqrt(total)) if draws else mean

    x_0 = sample(network, process, normal(0), "ancestral", timesteps, step_noise=lambda i: normal(1 + i))
    return x_0.square().sum().sqrt().item()


@pytest.mark.parametrize("timesteps", [1, 2, 4, 8])
def test_a_network_that_draws_keeps_the_deviation_and_one_that_gives_the_mean_loses_it(timesteps):
    start = math.exp(-10.05) if timesteps > 1 else 0.0  # of variance 1, and not 1 − ᾱ (1 − S²)
    assert deviation_of_samples(timesteps, draws=True) == pytest.approx(S, abs=S * start + 1e-12)
    assert deviation_of_samples(timesteps, draws=False) < 0.75 * S


def test_four_steps_of_the_mean_leave_what_was_computed_by_hand():
    assert deviation_of_samples(4, draws=False) == pytest.approx(0.1446, abs=5e-5)


def test_it_asks_its_network_once_a_step():
    assert network_evaluations(DenoisingGAN(chain_of(4)), "ancestral", 4) == 4


def test_the_model_is_told_its_timestep_and_its_numbers():
    z = torch.randn(3, 5)
    told = DenoisingGAN(chain_of(4), latent=5).told(torch.tensor([0, 3, 1]), z)
    assert told.dtype == torch.float32
    assert torch.equal(told, torch.cat([torch.tensor([[0.0], [3.0], [1.0]]), z], dim=1))
