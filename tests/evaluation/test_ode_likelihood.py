"""Bits per dimension by the ODE: of a model known exactly, on any number of ranks, and by the command."""

import math

import numpy as np
import pytest
import torch

from dtrain.diffusion.flow import RectifiedFlow
from dtrain.errors import NotFinite
from dtrain.evaluation.generate import Generator
from dtrain.evaluation.ode_likelihood import LEVEL, dequantised, measured
from dtrain.randomness import Purpose
from dtrain.tracking.journal import read
from tests.command_line import command
from tests.digits import tiny
from tests.evaluation.exact_mixture import ExactMixture, drawn, log_density_of_mixture
from tests.ranks import run_ranks
from tests.training.runs import train

SMALL = ("data.image_size=2", "data.holdout=null", "diffusion={process: flow}", "eval.batch_size=64")


def exact(folder, *overrides):
    config = tiny(folder, folder, *SMALL, *overrides)
    return Generator.of(ExactMixture(RectifiedFlow()), RectifiedFlow(), config, torch.device("cpu")), config.eval


def levels(n, seed=0):
    """Draws of the mixture on the levels of 8 bits, float32 (n, 1, 2, 2) in [−1, 1]."""
    return ((drawn(n, seed).view(-1, 1, 2, 2) + 1) * 127.5).round().div(127.5).sub(1).float()


def test_bits_of_pixels_are_those_of_the_density_in_units_of_levels(tmp_path):
    generator, how = exact(tmp_path, "eval.ode_probes=64")
    images = levels(60)
    found = measured("bpd_ode", generator, images, torch.zeros(60, dtype=torch.int64), how)
    points = dequantised(images, generator.normals(how.seed, range(60))(Purpose.DEQUANTISATION)).double().flatten(1)
    true = -float(log_density_of_mixture(points).mean()) / 4 / math.log(2) + math.log2(127.5)
    assert found["bpd_ode"] == pytest.approx(true, abs=5e-3)  # what 64 probes are off, of 60 images
    assert found["bpd_ode"] == pytest.approx(
        found["bpd_ode_prior"] + found["bpd_ode_volume"] + math.log2(127.5), abs=1e-12
    )


def test_dequantised_pixels_lie_evenly_within_the_bin_of_their_level():
    normals = torch.from_numpy(np.random.default_rng(0).standard_normal((50_000, 1)))
    away = (dequantised(torch.zeros(50_000, 1).double(), normals) / LEVEL).flatten()
    assert away.abs().max() <= 0.5
    assert abs(away.mean()) < 0.005
    assert away.std() == pytest.approx(math.sqrt(1 / 12), rel=0.01)


def _on_a_rank(folder):
    generator, how = exact(folder, "eval.ode_tolerance=1e-3")
    return measured("bpd_ode", generator, levels(200), torch.zeros(200, dtype=torch.int64), how)


def test_any_number_of_ranks_gives_the_same_bits(tmp_path):
    (one,), three = run_ranks(_on_a_rank, 1, tmp_path), run_ranks(_on_a_rank, 3, tmp_path)
    assert three == [one] * 3


def test_the_command_evaluates_a_trained_flow_and_says_how(digits, tmp_path):
    flow = ["diffusion={process: flow}", "eval.validation_images=20", "eval.metrics=[bpd_ode]", "eval.batch_size=10"]
    config = tiny(digits, tmp_path, *flow, "eval.every=20", "eval.ode_tolerance=1e-3")
    run_ranks(train, 1, config)
    (line,) = [one for one in read(config.run.path / "journal.jsonl") if one["event"] == "eval"]
    metrics, context = line["metrics"], line["context"]
    assert {name for name in metrics if name.startswith("bpd")} == {"bpd_ode", "bpd_ode_prior", "bpd_ode_volume"}
    assert (context["ode_tolerance"], context["ode_probes"], context["validation_images"]) == (1e-3, 1, 20)
    code, said = run_ranks(command, 2, "evaluate", config.run.path)[0]
    assert code == 0, said
    assert f"bpd_ode {metrics['bpd_ode']:.4f}" in said


def test_a_walk_that_cannot_go_on_is_an_error_that_names_the_images(tmp_path):
    generator, how = exact(tmp_path)
    generator = Generator(**{**generator.__dict__, "model": Broken()})
    with pytest.raises(NotFinite, match="bpd_ode of held-out images 0 to 9"):
        measured("bpd_ode", generator, levels(10), torch.zeros(10, dtype=torch.int64), how)


class Broken(torch.nn.Module):
    def forward(self, x, t, y):
        return x * float("inf")
