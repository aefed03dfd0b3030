"""The loss of gamma noise: that of the state and target that the process' own noise gives."""

import pytest
import torch

from dtrain.config import Gaussian
from dtrain.diffusion.gamma import GammaDiffusion
from dtrain.objectives.build import denoising
from dtrain.objectives.denoising import Denoising
from dtrain.objectives.gamma import GammaDenoising
from tests.diffusion.numbers import normal
from tests.objectives.rows import row_losses


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_perfect_network_has_no_loss_and_gets_states_of_the_batchs_own_normals(prediction):
    objective = denoising(Gaussian(noise="gamma", theta_0=0.005, prediction=prediction))
    process = objective.process
    assert (type(objective), type(process), process.theta_0) == (GammaDenoising, GammaDiffusion, 0.005)
    x0, z, u = normal(4, 1, 2, 2), normal(4, 1, 2, 2, seed=1), torch.tensor([0.001, 0.3, 0.7, 0.999]).double()
    t = process.time(u)
    noise = process.noise(z, t)
    alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (process.schedule.alpha, process.schedule.sigma))
    seen = {}

    def perfect(x, time):
        seen["x"] = x
        return {"eps": noise, "x0": x0.double(), "v": alpha * noise - sigma * x0}[prediction]

    losses = row_losses(objective, perfect, x0, z, u, {})
    assert losses.dtype == torch.float32
    assert losses.max() < 1e-12
    torch.testing.assert_close(seen["x"], (alpha * x0 + sigma * noise).float(), rtol=0, atol=0)
    assert (noise - z).abs()[0].max() > 0.01  # of the first timesteps it is not normal


def test_other_noise_is_what_it_was():
    assert type(denoising(Gaussian())) is Denoising
