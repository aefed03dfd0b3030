"""The bound as published code adds it up, and what guidance leaves of a learned variance, through a whole sampler."""

import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dtrain.cli.arguments import with_eval
from dtrain.diffusion.process import build as build_process
from dtrain.evaluation.evaluate import differences, evaluate
from dtrain.evaluation.generate import Generator
from dtrain.evaluation.likelihood import bits_per_dim, nats_per_dim
from dtrain.evaluation.opened import open_generator
from dtrain.evaluation.reference import Reference
from dtrain.randomness import Draws, Purpose
from dtrain.run import RunDirectory
from dtrain.tracking.best import training_evaluations
from tests.digits import tiny
from tests.ranks import run_ranks

T = 30
LEARNED = ("diffusion.variance=learned_range", "diffusion.loss=hybrid", f"diffusion.timesteps={T}")


class Overshooting(torch.nn.Module):
    """Its x̂_0 leaves [−1, 1] at every noise level, its variance depends on x, t and the class."""

    def forward(self, x, t, y):
        shift = (y.view(-1, 1, 1, 1) + 1) / 10
        return torch.cat([0.3 * x + shift, torch.tanh(x + shift) - t.view(-1, 1, 1, 1) / T], dim=1)


def overshooting(config) -> Generator:
    return Generator.of(Overshooting(), build_process(config.diffusion), config, torch.device("cpu"))


def published(generator, images, labels, clip: bool) -> float:
    """calc_bpd_loop of guided-diffusion, clip_denoised as asked, in float64 and with torch's own normals."""
    abar = generator.process.schedule.alpha_bar.double()
    previous = torch.cat([torch.ones(1).double(), abar[:-1]])
    beta, x_0, draws = 1 - abar / previous, images.double(), Draws(0, generator.noise)
    beta_tilde = beta * (1 - previous) / (1 - abar)
    log_small = torch.cat([beta_tilde[1:2], beta_tilde[1:]]).log()
    end = Normal(abar[-1].sqrt() * x_0, (1 - abar[-1]).sqrt())
    nats = kl_divergence(end, Normal(0.0, 1.0)).mean()
    for t in range(T):
        noise = torch.stack([torch.from_numpy(draws.normal(Purpose.VALIDATION_NOISE, i, generator.shape, t)) for i in
                             range(len(images))]).double()  # fmt: skip
        x_t = abar[t].sqrt() * x_0 + (1 - abar[t]).sqrt() * noise
        eps, channels = generator.model(x_t, torch.full((len(x_t),), t), labels).chunk(2, dim=1)
        x_0_hat = (x_t - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        if clip:
            x_0_hat = x_0_hat.clamp(-1, 1)
        of_x_0 = previous[t].sqrt() * beta[t] / (1 - abar[t])
        of_x_t = (1 - beta[t]).sqrt() * (1 - previous[t]) / (1 - abar[t])
        share = (channels + 1) / 2
        std = (0.5 * (share * beta[t].log() + (1 - share) * log_small[t])).exp()
        model = Normal(of_x_0 * x_0_hat + of_x_t * x_t, std)
        if t:
            true = Normal(of_x_0 * x_0 + of_x_t * x_t, (0.5 * log_small[t]).exp())
            nats = nats + kl_divergence(true, model).mean()
        else:
            above, below = model.cdf(x_0 + 1 / 255), model.cdf(x_0 - 1 / 255)
            below, above = below.masked_fill(x_0 < -0.999, 0), above.masked_fill(x_0 > 0.999, 1)
            nats = nats - (above - below).log().mean()
    return float(nats) / math.log(2)


@pytest.mark.parametrize("clip", [True, False])
def test_bits_per_dim_are_those_of_the_published_loop_clipped_or_not(digits, tmp_path, clip):
    generator = overshooting(tiny(digits, tmp_path, *LEARNED))
    levels = torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images, labels = levels / 127.5 - 1, torch.arange(6)
    found = bits_per_dim(generator, images, labels, 0, clip)
    expected = {c: published(generator, images, labels, c) for c in (True, False)}
    assert found["bpd"] == pytest.approx(expected[clip], rel=1e-5)
    assert expected[True] < 0.95 * expected[False]


@pytest.mark.parametrize("generator", [1, 2])
def test_the_noise_of_an_evaluation_is_of_the_runs_generator(digits, tmp_path, generator):
    found = overshooting(tiny(digits, tmp_path, *LEARNED, f"run.generator={generator}")).normals(7, [3, 2**40])
    for purpose, sub in ((Purpose.SAMPLE_NOISE, 0), (Purpose.SAMPLE_STEP_NOISE, 9)):
        for row, key in zip(found(purpose, sub), (3, 2**40), strict=True):
            alone = Draws(7, generator)
            if generator == 1:  # NumPy's own
                expected = alone.at(purpose, key, sub).standard_normal((1, 8, 8), dtype=np.float32)
            else:
                expected = alone.normal(purpose, key, (1, 8, 8), sub)
            assert np.array_equal(row.numpy(), expected)


def _train(config):
    from dtrain.training.run_training import train

    return train(config)


def test_a_new_runs_bound_is_clipped_an_older_runs_is_not_and_each_says_so(digits, tmp_path):
    few = ("eval.every=2", "train.steps=2", "eval.num_samples=12", "eval.validation_images=4", "eval.metrics=[bpd]")
    config = tiny(digits, tmp_path, *few, f"diffusion.timesteps={T}")
    run_ranks(_train, 1, config)
    (line,) = [json.loads(t) for t in (config.run.path / "journal.jsonl").read_text().splitlines() if '"eval"' in t]
    assert line["context"]["bpd_clip"] is True
    written = config.run.path / "config.yaml"
    text = written.read_text()
    assert "  bpd_clip: true\n" in text
    written.write_text(text.replace("  bpd_clip: true\n", ""))  # as it was written before there was the key
    run = RunDirectory(config.run.path)
    own, before = run.config(), training_evaluations(run.journal_file)
    found = []
    for chosen in ({}, {"bpd_clip": True}):  # as `dtrain evaluate` and its --bpd-clip ask
        now = with_eval(own, chosen, raw=False)
        generator = open_generator(run, now, torch.device("cpu")).generator
        metrics, context = evaluate(generator, now, Reference.open(now, torch.device("cpu")))
        found.append((metrics["bpd"], context["bpd_clip"], differences(before, own.eval, now.eval, context)))
    (unclipped, *unsaid), (clipped, *asked) = found
    assert (unsaid, asked) == ([False, {"bpd_clip": False}], [True, {}])
    assert clipped == pytest.approx(line["metrics"]["bpd"])
    assert clipped < unclipped


def test_first_3_of_a_grey_image_with_a_learned_variance_is_all_of_it(digits, tmp_path):
    """Guided along the chain whose steps draw with the learned variance: the same images, bit for bit."""
    common = (*LEARNED, "eval.guidance=3", "eval.sampler=ancestral", "eval.steps=10")
    drawn = []
    for channels in ("all", "first_3"):
        config = tiny(digits, tmp_path, *common, f"eval.guidance_channels={channels}")
        drawn.append(overshooting(config).draw(list(range(8)), torch.arange(8), config.eval))
    assert torch.equal(*drawn)
    assert drawn[0].float().std() > 1


class Standard(torch.nn.Module):
    """What is best for x_0 of unit variance: E[ε | x_t] = σ_t x_t."""

    def __init__(self, process):
        super().__init__()
        self.sigma = (1 - process.schedule.alpha_bar).sqrt().float()

    def forward(self, x, t, y):
        return self.sigma[t].view(-1, 1, 1, 1) * x


class StandardOfVariational(torch.nn.Module):
    """The same, told γ: σ² = sigmoid(γ)."""

    def forward(self, x, t, y):
        gamma = -13.3 + 18.3 * t.double() / 1000
        return torch.sigmoid(gamma).sqrt().float().view(-1, 1, 1, 1) * x


class Given:
    """A first stage whose latents are what it is given."""

    fingerprint = "given"

    def encode(self, pixels):
        return pixels


def test_the_bound_on_latents_of_unit_variance_is_their_density(digits, tmp_path):
    """Where x_0 is standard normal, x_{t−1} given x_t is N(√(1 − β_t) x_t, β_t), as fixed_large has it."""
    keys = ("variance=fixed_large", "timesteps=50", "schedule=linear", "prediction=eps")
    config = tiny(digits, tmp_path, *(f"diffusion.{key}" for key in keys))
    process = build_process(config.diffusion, "continuous")
    x_0 = torch.randn(2048, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = Generator.of(Standard(process), process, config, torch.device("cpu"), Given())
    found = nats_per_dim(generator, x_0, torch.zeros(2048, dtype=torch.int64), seed=0)
    ratio = process.schedule.beta[0] / process.log_beta_tilde[0].exp()  # the last step alone has a narrower variance
    expected = -Normal(0.0, 1.0).log_prob(x_0).mean() + 0.5 * (ratio - 1 - ratio.log())
    assert found["nats_per_dim_latent"] == pytest.approx(float(expected), abs=0.01)  # of 131,072 values


def test_the_bound_of_variational_diffusion_on_latents_of_unit_variance_is_their_density(digits, tmp_path):
    config = tiny(digits, tmp_path, "diffusion={process: vdm}")
    process = build_process(config.diffusion, "continuous")
    x_0 = torch.randn(512, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = Generator.of(StandardOfVariational(), process, config, torch.device("cpu"), Given())
    found = nats_per_dim(generator, x_0, torch.zeros(512, dtype=torch.int64), seed=0)
    expected = -Normal(0.0, 1.0).log_prob(x_0).mean()
    assert found["nats_per_dim_latent"] == pytest.approx(float(expected), abs=0.01)  # of 32,768 values
