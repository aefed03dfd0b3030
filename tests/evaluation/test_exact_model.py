"""A model whose score is exact, through the whole evaluation: uint8 images, features, moments, Fréchet distance."""

import numpy as np
import pytest
import torch

from dtrain.data.fields.picture import quantize
from dtrain.diffusion.prediction import target
from dtrain.diffusion.process import build as build_process
from dtrain.evaluation.evaluate import evaluate
from dtrain.evaluation.generate import Sampler
from dtrain.evaluation.metrics.frechet import frechet_distance
from dtrain.evaluation.metrics.statistics import Statistics
from dtrain.evaluation.reference import Reference
from tests.digits import tiny
from tests.longer import longer

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-0.4, 0.1, 0.3, -0.2], [0.3, 0.4, -0.3, 0.1], [0.2, -0.4, 0.1, 0.4]], dtype=torch.float64)
STD = 0.08  # so that nothing of the mixture lies outside the pixels' [−1, 1]
N = 4000


class ExactMixture(torch.nn.Module):
    """E[target | x_t] of images (N, 1, 2, 2) that are drawn from the mixture."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x, t, y):
        time = t[0].item()
        alpha, sigma = self.process.level(time / 1000 if self.process.prediction == "velocity" else time)
        points, variance = x.double().flatten(1)[:, None], alpha**2 * STD**2 + sigma**2
        away = points - alpha * MEANS  # (N, 3, 4)
        share = torch.softmax(WEIGHTS.log() - away.square().sum(2) / (2 * variance), dim=1)[:, :, None]
        x0 = (share * (MEANS + alpha * STD**2 / variance * away)).sum(1).view_as(x)
        eps = (share * (sigma / variance * away)).sum(1).view_as(x)
        return target(self.process.prediction, x0, eps, alpha, sigma).to(x.dtype)


def truth() -> Statistics:
    mean = (WEIGHTS[:, None] * MEANS).sum(0)
    spread = MEANS - mean
    return Statistics(10**9, mean.numpy(), (STD**2 * torch.eye(4) + spread.T @ (WEIGHTS[:, None] * spread)).numpy())


def null() -> float:
    """The largest distance to the truth of thirty draws of N images from the mixture itself."""
    distances = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        images = MEANS[rng.choice(3, N, p=WEIGHTS.numpy())] + STD * torch.from_numpy(rng.standard_normal((N, 4)))
        pixels = quantize(images).numpy() / 127.5 - 1
        distances.append(frechet_distance(Statistics(N, pixels.mean(0), np.cov(pixels.T)), truth()))
    return max(distances)


@pytest.mark.parametrize(
    "walk",
    [
        ["eval.eta=0"],
        longer(["eval.eta=0.5"]),
        longer(["eval.eta=sigma_hat"]),
        ["eval.spacing=quad"],
        ["diffusion.prediction=v", "diffusion.schedule=cosine"],
        longer(["eval.sampler=ancestral"]),
        longer(["eval.sampler=ancestral", "diffusion.variance=fixed_large"]),
        ["eval.sampler=dpmpp_2m"],
        ["eval.sampler=heun"],
        ["diffusion={process: flow}", "eval.sampler=euler"],
        ["diffusion={process: flow}", "eval.sampler=heun"],
    ],
    ids=lambda walk: "-".join(part.partition("=")[2] for part in walk),
)
def test_the_distance_to_the_truth_falls_to_the_null_value_as_steps_grow(tmp_path, walk):
    np.savez(tmp_path / "truth.npz", mu=truth().mean, sigma=truth().cov)
    shared = ["data.image_size=2", "data.holdout=null", "eval.labels=uniform", f"eval.reference={tmp_path}/truth.npz"]
    shared += ["eval.features=pixels", f"eval.num_samples={N}", "eval.batch_size=1000"]
    distances = []
    for steps in (3, 12, 250):
        config = tiny(tmp_path, tmp_path, *shared, *walk, f"eval.steps={steps}")
        process = build_process(config.diffusion)
        sampler = Sampler.of(ExactMixture(process), process, config, torch.device("cpu"))
        metrics, context = evaluate(sampler, config, Reference(config, torch.device("cpu")))
        assert context["n"] == N
        distances.append(metrics["fd_pixels"])
    assert distances[0] > 10 * distances[2]
    assert distances[1] < distances[0]
    assert distances[2] < null()
