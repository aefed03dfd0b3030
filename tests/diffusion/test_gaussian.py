import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.config import Gaussian
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.process import build
from dtrain.diffusion.schedule import linear
from tests.diffusion.numbers import PROCESS, normal, perfect_output


@given(st.integers(21, 5000))
def test_time_spans_the_schedule_and_never_leaves_it(T):
    p = GaussianDiffusion(linear(T))
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert p.time(u).tolist() == [0, T // 2, T - 1]


def test_every_timestep_holds_an_equal_share_of_u():
    u = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    assert torch.bincount(PROCESS.time(u)).tolist() == [50] * 1000


def test_noised_is_alpha_x0_plus_sigma_noise():
    x0, noise, t = normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1), torch.tensor([0, 1, 500, 998, 999])
    beta = np.linspace(1e-4, 0.02, 1000)
    for row, i in enumerate(t.tolist()):
        alpha_bar = np.prod(1 - beta[: i + 1])
        expected = np.sqrt(alpha_bar) * x0[row].double().numpy() + np.sqrt(1 - alpha_bar) * noise[row].double().numpy()
        np.testing.assert_allclose(PROCESS.noised(x0.double(), noise.double(), t)[row].numpy(), expected, rtol=1e-12)
        np.testing.assert_allclose(PROCESS.noised(x0, noise, t)[row].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(
            PROCESS.noised(x0[row : row + 1], noise[row : row + 1], i)[0], PROCESS.noised(x0, noise, t)[row]
        )


def test_x0_and_eps_undo_the_noising():
    x0, noise, t = normal(4, 3, 4, 4).double(), normal(4, 3, 4, 4, seed=1).double(), torch.tensor([0, 10, 500, 999])
    x_t = PROCESS.noised(x0, noise, t)
    assert torch.equal(PROCESS.eps(noise, x_t, t), noise)
    torch.testing.assert_close(PROCESS.x0(noise, x_t, t), x0, rtol=0, atol=1e-12)
    for row, i in enumerate(t.tolist()):
        assert torch.equal(PROCESS.x0(noise[row], x_t[row], i), PROCESS.x0(noise, x_t, t)[row])


def test_the_configured_process():
    built = build(Gaussian(timesteps=500))
    assert built.prediction == "eps"
    assert torch.equal(built.schedule.alpha_bar, linear(500).alpha_bar)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_every_prediction_says_what_x0_and_eps_are(prediction, variance):
    p = GaussianDiffusion(linear(1000), prediction, variance)
    x0, noise, t = normal(4, 3, 4, 4).double(), normal(4, 3, 4, 4, seed=1).double(), torch.tensor([0, 10, 500, 999])
    output = torch.stack([perfect_output(x0[r], noise[r], i, prediction) for r, i in enumerate(t.tolist())])
    if variance == "learned_range":
        output = torch.cat([output, normal(4, 3, 4, 4, seed=2).double()], dim=1)
    x_t = p.noised(x0, noise, t)
    torch.testing.assert_close(p.x0(output, x_t, t), x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(p.eps(output, x_t, t), noise, rtol=0, atol=1e-10)


def test_the_variance_of_each_kind():
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    small = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * beta[1:]  # from t = 1
    x, t = torch.zeros(3, 1, 1, 1).double(), torch.tensor([0, 1, 700])
    expected = {
        "fixed_small": [small[0], small[0], small[699]],
        "fixed_large": [small[0], beta[1], beta[700]],
        "learned_range": [
            beta[0] ** 0.75 * small[0] ** 0.25, beta[1] ** 0.75 * small[0] ** 0.25,
            beta[700] ** 0.75 * small[699] ** 0.25
        ],
    }  # fmt: skip
    for variance, values in expected.items():
        p = GaussianDiffusion(linear(1000), variance=variance)
        output = torch.cat([x, x + 0.5], dim=1)
        np.testing.assert_allclose(p.log_variance(output, x, t).flatten(), np.log(values), rtol=1e-10)


def test_the_configured_process_has_every_choice():
    built = build(
        Gaussian(
            schedule="cosine",
            timesteps=200,
            zero_terminal_snr=True,
            prediction="v",
            variance="learned_range",
            loss="hybrid",
        )
    )
    assert (built.prediction, built.variance) == ("v", "learned_range")
    assert built.schedule.has_zero_terminal_snr
