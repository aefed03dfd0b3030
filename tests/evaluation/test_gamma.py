"""What samples of gamma noise begin at."""

import pytest
import torch

from dtrain.diffusion.process import build as build_process
from dtrain.errors import UserError
from dtrain.evaluation.generate import Generator
from dtrain.evaluation.start import Start
from dtrain.randomness import Draws, Purpose
from tests.digits import tiny

GAMMA = "diffusion.noise=gamma", "diffusion.theta_0=0.009", "eval.sampler=ancestral", "eval.steps=4"


class Watching(torch.nn.Module):
    """Answers 0 and keeps what it was asked."""

    def forward(self, x, t, y):
        self.seen = [*getattr(self, "seen", []), (x, int(t[0]))]
        return torch.zeros_like(x)


@pytest.fixture
def generator(tmp_path):
    config = tiny(tmp_path, tmp_path, *GAMMA, "data.holdout=null", "eval.spacing=[900, 400, 40, 20]")
    return Generator.of(Watching(), build_process(config.diffusion), config, torch.device("cpu")), config.eval


def test_they_begin_at_gamma_noise_of_the_first_timestep_made_of_their_own_normals(generator):
    ours, how = generator
    ours.draw([5, 9], torch.tensor([1, 2]), how)
    (x_T, time), *others = ours.model.seen
    z = torch.from_numpy(Draws(how.seed, 2).normals(Purpose.SAMPLE_NOISE, [5, 9], (1, 8, 8)))
    assert time == 900
    assert torch.equal(x_T, ours.process.noise(z, 900).float())
    assert [t for _, t in others] == [400, 40, 20]


def test_at_pictures_they_begin_with_gamma_noise_of_the_time_begun_at(generator):
    ours, how = generator
    images = torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)
    ours.draw([3], torch.tensor([1]), how, start=Start(images, 0.25))
    x_t, time = ours.model.seen[0]
    z = torch.from_numpy(Draws(how.seed, 2).normals(Purpose.SAMPLE_NOISE, [3], (1, 8, 8)))
    alpha, sigma = ours.process.level(20)
    assert time == 20
    expected = alpha * (200 / 127.5 - 1) + sigma * ours.process.noise(z, 20)
    torch.testing.assert_close(x_t, expected.float(), rtol=0, atol=1e-6)
    assert (ours.process.noise(z, 20) - z).abs().max() > 0.05  # which is not the normal one
    with pytest.raises(UserError, match=r"repeats 5 noises back with normal noise, .* take repeats 1"):
        ours.draw([3], torch.tensor([1]), how, start=Start(images, 1.0, images > 0, repeats=5))
