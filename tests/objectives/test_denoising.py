"""What training descends, against its definitions."""

import numpy as np
import pytest
import torch

from dtrain.config import Gaussian
from dtrain.diffusion import likelihood
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.prediction import target
from dtrain.diffusion.schedule import linear
from dtrain.diffusion.times import SecondMoment, Uniform
from dtrain.objectives.build import denoising
from dtrain.objectives.denoising import Denoising
from tests.diffusion.numbers import PROCESS, normal, perfect_output
from tests.objectives.rows import row_losses

objective = Denoising(PROCESS)


def test_each_rows_loss_is_its_own_mean_squared_error():
    x0, noise, labels = normal(4, 3, 5, 5), normal(4, 3, 5, 5, seed=1), torch.tensor([3, 1, 2, 0])
    u = torch.tensor([0.0, 0.3141, 0.6, 0.9999], dtype=torch.float64)

    def model(x, t, y):
        return x * y.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000

    losses = row_losses(objective, model, x0, noise, u, {"y": labels})
    assert losses.dtype == torch.float32
    assert losses.shape == (4,)
    for row, t in enumerate([0, 314, 600, 999]):
        x_t = PROCESS.noised(x0[row], noise[row], t).double()
        expected = ((x_t * labels[row] + t / 1000 - noise[row]) ** 2).mean()
        np.testing.assert_allclose(losses[row], expected, rtol=1e-5)


def test_losses_of_a_bfloat16_model_are_summed_in_float32():
    x0, noise = torch.zeros(2, 1, 64, 64), torch.zeros(2, 1, 64, 64)
    u, labels = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    value = torch.tensor(0.1).bfloat16()
    losses = row_losses(
        objective, lambda x, t, y: torch.full_like(x, float(value)).bfloat16(), x0, noise, u, {"y": labels}
    )
    np.testing.assert_allclose(losses, float(value) ** 2, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_simple_loss_is_the_weighted_error_of_the_prediction(prediction, gamma):
    p = GaussianDiffusion(linear(1000), prediction)
    x0, noise, labels = normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1), torch.zeros(4, dtype=torch.long)
    u, output = torch.tensor([0.0, 0.2, 0.6, 0.9999], dtype=torch.float64), normal(4, 2, 3, 3, seed=2)
    losses = row_losses(Denoising(p, min_snr_gamma=gamma), lambda x, t, y: output, x0, noise, u, {"y": labels})
    for row, t in enumerate([0, 200, 600, 999]):
        error = float((perfect_output(x0[row], noise[row], t, prediction) - output[row]).square().mean())
        snr = float(p.schedule.snr[t])
        weight = {"eps": min(snr, 5) / snr, "x0": min(snr, 5), "v": min(snr, 5) / (snr + 1)}[prediction]
        assert float(losses[row]) == pytest.approx(error * (weight if gamma else 1), rel=1e-4)


def test_min_snr_weighs_every_prediction_as_the_same_error_of_x0():
    x0, noise = normal(3, 1, 4, 4).double(), normal(3, 1, 4, 4, seed=1).double()
    x0_hat, u = normal(3, 1, 4, 4, seed=2).double(), torch.tensor([0.01, 0.4, 0.8], dtype=torch.float64)
    losses = []
    for prediction in ("eps", "x0", "v"):
        p = GaussianDiffusion(linear(1000), prediction)

        def model(x, t, y, p=p):
            alpha, sigma = p.table(p.schedule.alpha, t, x), p.table(p.schedule.sigma, t, x)
            return target(p.prediction, x0_hat, (x - alpha * x0_hat) / sigma, alpha, sigma)

        losses.append(
            row_losses(Denoising(p, min_snr_gamma=5.0), model, x0, noise, u, {"y": torch.zeros(3, dtype=torch.long)})
        )
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-8, atol=0)


@pytest.mark.parametrize("T", [100, 1000])
def test_the_vlb_loss_is_the_bound_without_its_prior_on_average_over_times(T):
    p = GaussianDiffusion(linear(T), "v", "learned_range")
    x0, noise = 0.3 * normal(1, 1, 4, 4).double(), normal(1, 1, 4, 4, seed=1).double()

    def model(x, t, y=None):
        return torch.cat([0.5 * x, torch.sin(x) + t.view(-1, 1, 1, 1) / T], dim=1)

    u = (torch.arange(T, dtype=torch.float64) + 0.5) / T
    everywhere = [a.expand(T, -1, -1, -1) for a in (x0, noise)]
    losses = row_losses(Denoising(p, "vlb"), model, *everywhere, u, {"y": torch.zeros(T, dtype=torch.long)})
    curve = likelihood.curve(model, p, x0, lambda t: noise)
    assert float(losses.mean()) == pytest.approx(float(curve.sum()), rel=1e-10)


def test_importance_keeps_the_vlb_loss_on_average():
    times = SecondMoment(50)
    for _ in range(10):
        times.observe(torch.arange(50), torch.linspace(5, 0.1, 50))
    x0, noise = 0.3 * normal(1, 1, 2, 2).double(), normal(1, 1, 2, 2, seed=1).double()
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    everywhere = [a.expand(len(u), -1, -1, -1) for a in (x0, noise)]
    condition = {"y": torch.zeros(len(u), dtype=torch.long)}
    objectives = [Denoising(GaussianDiffusion(linear(50)), "vlb", times=each) for each in (Uniform(), times)]
    means = [float(row_losses(one, lambda x, t, y: 0.5 * x, *everywhere, u, condition).mean()) for one in objectives]
    assert means[1] == pytest.approx(means[0], rel=2e-3)


def test_the_hybrid_loss_trains_the_mean_by_the_simple_loss_alone_and_the_variance_by_the_bound():
    T = 400  # at 1000, 0.001·T is 1 and a forgotten factor would not show
    hybrid, simple, vlb = (
        Denoising(GaussianDiffusion(linear(T), "eps", "learned_range"), loss) for loss in ("hybrid", "simple", "vlb")
    )
    x0, noise, labels = normal(6, 1, 3, 3), normal(6, 1, 3, 3, seed=1), torch.zeros(6, dtype=torch.long)
    u = torch.tensor([0.0, 0.001, 0.01, 0.3, 0.8, 0.999], dtype=torch.float64)
    gradients, values = {}, {}
    for name, p in {"hybrid": hybrid, "simple": simple, "vlb": vlb}.items():
        output = (0.1 * normal(6, 2, 3, 3, seed=2)).requires_grad_()
        values[name] = row_losses(p, lambda x, t, y, output=output: output, x0, noise, u, {"y": labels})
        (gradients[name],) = torch.autograd.grad(values[name].sum(), output)
    torch.testing.assert_close(values["hybrid"], values["simple"] + 0.001 * values["vlb"], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients["hybrid"][:, :1], gradients["simple"][:, :1])
    torch.testing.assert_close(gradients["hybrid"][:, 1:], 0.001 * gradients["vlb"][:, 1:])
    assert torch.count_nonzero(gradients["simple"][:, 1:]) == 0
    assert float(gradients["vlb"][:, 1:].abs().min()) > 0


@pytest.mark.parametrize("timesteps", [1000, 4000])
@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
def test_the_bounds_gradient_is_finite_at_every_timestep_and_that_of_a_term_by_itself(loss, timesteps):
    """At the end of the cosine schedule an x̂_0 is 1e5, which must not reach the decoder of rows of other timesteps."""
    p = denoising(Gaussian(schedule="cosine", timesteps=timesteps, variance="learned_range", loss=loss))
    u = torch.cat([torch.arange(0, timesteps, 7), torch.tensor([timesteps - 1])]).double().add(0.5) / timesteps
    x0, noise = normal(len(u), 1, 4, 4).clamp(-1, 1), normal(len(u), 1, 4, 4, seed=1)
    labels = torch.zeros(len(u), dtype=torch.long)

    def gradient(rows):
        output = normal(len(u), 2, 4, 4, seed=2)[rows].requires_grad_()
        losses = row_losses(p, lambda x, t, y: output, x0[rows], noise[rows], u[rows], {"y": labels[rows]})
        return torch.autograd.grad(losses.sum(), output)[0]

    together = gradient(torch.arange(len(u)))
    assert torch.isfinite(together).all()
    assert (together.flatten(1).abs().max(1).values > 0).all()
    decoder_alone = gradient(torch.tensor([0]))
    torch.testing.assert_close(together[:1], decoder_alone)


def test_losses_at_a_place_know_nothing_of_how_it_was_chosen():
    times = SecondMoment(1000)
    for _ in range(10):
        times.observe(torch.arange(1000), torch.linspace(9, 1, 1000))
    place = torch.tensor([0.1, 0.5], dtype=torch.float64)
    arguments = (lambda x, t: 0.5 * x, normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1), place, {})
    plain = row_losses(objective, *arguments)
    assert torch.equal(Denoising(PROCESS, times=times).losses_at(*arguments), plain)
    assert not torch.equal(row_losses(Denoising(PROCESS, times=times), *arguments), plain)


def test_tables_first_used_in_inference_mode_still_train():
    p = Denoising(GaussianDiffusion(linear(1000), "v", "learned_range"), "hybrid", 5.0)
    x0, noise, labels = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1), torch.zeros(2, dtype=torch.long)
    u, scale = torch.tensor([0.0, 0.5], dtype=torch.float64), torch.ones(1, requires_grad=True)

    def model(x, t, y):
        return scale * torch.cat([x, x], dim=1)

    with torch.inference_mode():
        first = row_losses(p, model, x0, noise, u, {"y": labels})
    again = row_losses(p, model, x0, noise, u, {"y": labels})
    again.sum().backward()
    assert torch.equal(again.detach(), first)
    assert float(scale.grad.abs()) > 0


def test_the_configured_objective_has_every_choice():
    built = denoising(Gaussian(timesteps=200, variance="learned_range", loss="hybrid", times="importance"))
    assert (built.loss, built.times.timesteps) == ("hybrid", 200)
    assert denoising(Gaussian(weighting="min_snr", min_snr_gamma=3)).min_snr_gamma == 3
    assert denoising(Gaussian()).min_snr_gamma is None
