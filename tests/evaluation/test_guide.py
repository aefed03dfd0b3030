"""Guidance by a weaker model: an earlier checkpoint or a smaller run in the place of the null."""

import numpy as np
import pytest
import torch

import dtrain
from dtrain.checkpoint.directory import manifest_hash
from dtrain.cli.arguments import with_eval
from dtrain.diffusion.samplers import sample
from dtrain.errors import UserError
from dtrain.evaluation.combinations import configured
from dtrain.randomness import Purpose
from dtrain.tracking.journal import read
from tests.command_line import command, failing
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.runs import train

LABELS = [0, 3, 7, 9]


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """(40 steps with a checkpoint at 20, and a run of half the width)."""
    folder = tmp_path_factory.mktemp("runs")
    settings = ["train.steps=40", "train.checkpoint_every=20", "train.keep_last=5", "ema.0.decay=0.8", "optim.lr=2e-3"]
    configs = [
        tiny(digits, folder, *settings),
        tiny(digits, folder, *settings, "run.name=small", "model.width=16"),
        tiny(digits, folder, *settings, "run.name=v", "diffusion.prediction=v", "train.steps=1"),
    ]
    for config in configs:
        run_ranks(train, 1, config)
    return [config.run.path for config in configs]


@pytest.mark.parametrize("which", ["earlier", "small"])
def test_samples_lead_away_from_the_weaker_model_told_the_same(runs, which):
    run, small, _ = runs
    place, step = (run / "checkpoints" / "step-00000020", 20) if which == "earlier" else (small, None)
    trained, weak = dtrain.load(run), dtrain.load(run if which == "earlier" else small, step=step)
    found = trained.sample(labels=LABELS, steps=5, guidance=2.5, guide_with=str(place))

    def denoiser(x, t):
        answers = [one.model(x, t, torch.tensor(LABELS)) for one in (weak, trained)]
        return answers[0] + 2.5 * (answers[1] - answers[0])

    ready = trained._generator(trained.config)
    noise = ready.normals(trained.config.eval.seed, range(len(LABELS)))

    with torch.inference_mode():
        x_0 = sample(denoiser, trained.process, noise(Purpose.SAMPLE_NOISE), "ddim", 5)
    expected = trained.first_stage.decode(x_0).permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 1
    plain = trained.sample(labels=LABELS, steps=5)
    assert np.abs(found.astype(int) - plain).max() > 20


def test_an_evaluation_says_by_which_weights_it_was_guided(runs):
    run, small, _ = runs
    arguments = ("evaluate", run, "-n", 24, "--steps", 2, "--features", "pixels", "--guidance", 2)
    code, said = run_ranks(command, 2, *arguments, "--guide-with", small)[0]
    assert code == 0, said
    (line,) = [one for path in run.glob("*.jsonl") for one in read(path) if "guide" in one.get("context", {})]
    assert line["context"]["guide"] == manifest_hash(small / "checkpoints" / "step-00000040")


def test_without_guidance_a_run_leaves_out_what_belongs_to_it(digits, tmp_path):
    """As `dtrain invert`, and a sweep that begins at guidance 1, take it."""
    own = tiny(digits, tmp_path, "eval.guidance=2", "eval.guidance_norm=3", "eval.guidance_orthogonal=1")
    for chosen in ({"guidance": 1}, {"guidance": 1.0, "steps": 3}):
        now = with_eval(own, chosen, raw=False).eval
        assert (now.guidance, now.guidance_norm, now.guidance_orthogonal) == (1.0, None, 0.0)
    assert configured(own, {"guidance": 1}).eval.guidance_norm is None
    assert with_eval(own, {"guidance": 3}, raw=False).eval.guidance_norm == 3
    with pytest.raises(UserError, match="has no effect with"):
        with_eval(own, {"guidance": 1, "guide_with": "runs/small"}, raw=False)


def test_a_model_that_answers_otherwise_or_is_not_there_is_refused(runs, tmp_path):
    run, _, other = runs
    line = failing("sample", run, "--guidance", 2, "--guide-with", other)
    assert line == f"eval.guide_with={other} cannot be used: diffusion.prediction is v there, eps here"
    line = failing("sample", run, "--guidance", 2, "--guide-with", tmp_path / "nowhere")
    assert "there is no such run, checkpoint or file" in line
    with pytest.raises(UserError, match="has no effect with"):
        dtrain.load(run).sample(1, guide_with=str(other))
