"""A model whose score is exact, through the whole evaluation: uint8 images, features, moments, Fréchet distance."""

import numpy as np
import pytest
import torch

from dtrain.data.fields.picture import quantize
from dtrain.diffusion.process import build as build_process
from dtrain.evaluation.evaluate import evaluate
from dtrain.evaluation.generate import Generator
from dtrain.evaluation.metrics.frechet import frechet_distance
from dtrain.evaluation.metrics.statistics import Statistics
from dtrain.evaluation.reference import Reference
from tests.digits import tiny
from tests.evaluation.exact_mixture import MEANS, STD, WEIGHTS, ExactMixture, drawn
from tests.longer import longer

N = 4000


def truth() -> Statistics:
    mean = (WEIGHTS[:, None] * MEANS).sum(0)
    spread = MEANS - mean
    return Statistics(10**9, mean.numpy(), (STD**2 * torch.eye(4) + spread.T @ (WEIGHTS[:, None] * spread)).numpy())


def null() -> float:
    """The largest distance to the truth of thirty draws of N images from the mixture itself."""
    distances = []
    for seed in range(30):
        pixels = quantize(drawn(N, seed)).numpy() / 127.5 - 1
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
        ["diffusion={process: vdm}", "eval.sampler=ancestral"],
        longer(["diffusion={process: vdm}", "eval.sampler=heun"]),
        ["diffusion={process: flow}", "eval.sampler=euler"],
        ["diffusion={process: flow}", "eval.sampler=heun"],
        longer(["diffusion={process: flow, prediction: x0}", "eval.sampler=euler"]),
        longer(["diffusion={process: flow, prediction: x0}", "eval.sampler=heun"]),
        longer(["diffusion={process: flow, prediction: x0}", "eval.sampler=sde"]),
        longer(["diffusion={process: edm, sigma_data: 0.3}"]),
        ["diffusion={process: edm, sigma_data: 0.3}", "eval.churn=40", "eval.churn_min=0.05", "eval.churn_noise=1.003"],
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
        generator = Generator.of(ExactMixture(process), process, config, torch.device("cpu"))
        metrics, context = evaluate(generator, config, Reference.open(config, torch.device("cpu")))
        assert context["n"] == N
        distances.append(metrics["fd_pixels"])
    assert distances[0] > 10 * distances[2]
    assert distances[1] < distances[0]
    assert distances[2] < null()
