import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.config import Diffusion
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.process import build
from dtrain.diffusion.schedule import linear

process = GaussianDiffusion(linear(1000))


def numbers(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


@given(st.integers(21, 5000))
def test_time_spans_the_schedule_and_never_leaves_it(T):
    p = GaussianDiffusion(linear(T))
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert p.time(u).tolist() == [0, T // 2, T - 1]


def test_every_timestep_holds_an_equal_share_of_u():
    u = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    assert torch.bincount(process.time(u)).tolist() == [50] * 1000


def test_noised_is_alpha_x0_plus_sigma_noise():
    x0, noise, t = numbers(5, 3, 4, 4), numbers(5, 3, 4, 4, seed=1), torch.tensor([0, 1, 500, 998, 999])
    beta = np.linspace(1e-4, 0.02, 1000)
    for row, i in enumerate(t.tolist()):
        alpha_bar = np.prod(1 - beta[: i + 1])
        expected = np.sqrt(alpha_bar) * x0[row].double().numpy() + np.sqrt(1 - alpha_bar) * noise[row].double().numpy()
        np.testing.assert_allclose(process.noised(x0.double(), noise.double(), t)[row].numpy(), expected, rtol=1e-12)
        np.testing.assert_allclose(process.noised(x0, noise, t)[row].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(
            process.noised(x0[row : row + 1], noise[row : row + 1], i)[0], process.noised(x0, noise, t)[row]
        )


def test_each_rows_loss_is_its_own_mean_squared_error():
    x0, noise, labels = numbers(4, 3, 5, 5), numbers(4, 3, 5, 5, seed=1), torch.tensor([3, 1, 2, 0])
    u = torch.tensor([0.0, 0.3141, 0.6, 0.9999], dtype=torch.float64)

    def model(x, t, y):
        return x * y.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000

    losses = process.losses(model, x0, noise, u, labels)
    assert losses.dtype == torch.float32
    assert losses.shape == (4,)
    for row, t in enumerate([0, 314, 600, 999]):
        x_t = process.noised(x0[row], noise[row], t).double()
        expected = ((x_t * labels[row] + t / 1000 - noise[row]) ** 2).mean()
        np.testing.assert_allclose(losses[row], expected, rtol=1e-5)


def test_losses_of_a_bfloat16_model_are_summed_in_float32():
    x0, noise = torch.zeros(2, 1, 64, 64), torch.zeros(2, 1, 64, 64)
    u, labels = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    value = torch.tensor(0.1).bfloat16()
    losses = process.losses(lambda x, t, y: torch.full_like(x, float(value)).bfloat16(), x0, noise, u, labels)
    np.testing.assert_allclose(losses, float(value) ** 2, rtol=1e-6)


def test_x0_and_eps_undo_the_noising():
    x0, noise, t = numbers(4, 3, 4, 4).double(), numbers(4, 3, 4, 4, seed=1).double(), torch.tensor([0, 10, 500, 999])
    x_t = process.noised(x0, noise, t)
    assert torch.equal(process.eps(noise, x_t, t), noise)
    torch.testing.assert_close(process.x0(noise, x_t, t), x0, rtol=0, atol=1e-12)
    for row, i in enumerate(t.tolist()):
        assert torch.equal(process.x0(noise[row], x_t[row], i), process.x0(noise, x_t, t)[row])


def test_the_configured_process():
    built = build(Diffusion(timesteps=500))
    assert built.prediction == "eps"
    assert torch.equal(built.schedule.alpha_bar, linear(500).alpha_bar)
