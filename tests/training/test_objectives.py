"""Every process, backbone and time distribution through the real loop: the same at any world size, and resumable."""

import numpy as np
import pytest
import torch

from dtrain.diffusion.times import SecondMoment
from dtrain.tracking.journal import read
from tests.digits import losses, tiny
from tests.longer import mostly_longer
from tests.training.runs import trained

UNET = (
    "model={name: unet, width: 16, multipliers: [1, 2], res_blocks: 1, attention: [4], dropout: 0.2, num_classes: 10}"
)
CHOICES = {
    "v-prediction": ["diffusion.prediction=v", "diffusion.stratified=true"],
    "hybrid": ["diffusion.loss=hybrid", "diffusion.variance=learned_range"],
    "importance": ["diffusion.loss=vlb", "diffusion.times=importance", "diffusion.timesteps=25", "eval.steps=5"],
    "flow": ["diffusion={process: flow, times: logit_normal}", "eval.sampler=heun"],
    "gamma": ["diffusion={noise: gamma, stratified: true}", "eval.sampler=ancestral"],
    "edm": ["diffusion={process: edm, stratified: true, sigma_data: 0.75}", "eval.churn=10"],
    "edm, uncertain": ["diffusion={process: edm, uncertainty: learned}", "deepspeed.zero_stage=3"],
    "unet with dropout": [UNET, "optim.lr=1e-3"],
}


@pytest.mark.parametrize("name", mostly_longer(CHOICES, ["importance", "edm, uncertain"]))
def test_one_rank_and_two_in_micro_batches_have_the_same_losses_and_go_on_after_a_stop(digits, tmp_path, name):
    long = "train.steps=60" if name == "importance" else "train.steps=16"
    overrides = [*CHOICES[name], long]
    one = trained(tiny(digits, tmp_path / "one", *overrides), 1)
    two = trained(tiny(digits, tmp_path / "two", *overrides, "train.micro_batch=4", "eval.every=8"), 2)
    assert two == pytest.approx(one, rel=2e-4, abs=1e-5)
    assert all(np.isfinite(one))
    half = long.replace("60", "45").replace("16", "8")
    trained(tiny(digits, tmp_path / "parts", *CHOICES[name], half), 2)
    again = trained(tiny(digits, tmp_path / "parts", *overrides), 2)
    assert again == pytest.approx(one, rel=2e-4, abs=1e-5)
    lines = read(tmp_path / "two/tiny/journal.jsonl")
    fds = [e["metrics"]["fd_pixels"] for e in lines if e["event"] == "eval"]
    assert all(np.isfinite(fds))


def test_the_loss_by_noise_level_adds_up_to_the_loss(digits, tmp_path):
    config = tiny(digits, tmp_path, "data.batch_size=240", "diffusion.stratified=true", "train.steps=4")
    whole = trained(config, 2)
    lines = [e["metrics"] for e in read(config.run.path / "journal.jsonl") if e["event"] == "train"]
    for loss, m in zip(whole, lines, strict=True):  # stratified: every level has 30 of the 240 rows
        assert np.mean([m[f"loss_level_{i}"] for i in range(8)]) == pytest.approx(loss, rel=1e-6)


def test_validation_losses_and_bits_per_dim_are_journaled_and_equal_on_one_rank_and_two(digits, tmp_path):
    found = []
    for world_size in (1, 2):
        overrides = ["eval.every=10", "train.steps=10", "eval.metrics=[fd, bpd]", "eval.validation_images=150"]
        overrides += ["diffusion.timesteps=50", "eval.steps=5"]
        config = tiny(digits, tmp_path / str(world_size), *overrides)
        trained(config, world_size)
        lines = read(config.run.path / "journal.jsonl")
        (evaluation,) = [e["metrics"] for e in lines if e["event"] == "eval"]
        (validation,) = [e["metrics"] for e in lines if e["event"] == "validation"]
        parts = sum(evaluation[k] for k in ("bpd_prior", "bpd_chain", "bpd_decoder"))
        assert evaluation["bpd"] == pytest.approx(parts)
        assert len(validation) == 8
        found.append([evaluation["bpd"], *validation.values()])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_labels_are_dropped_as_often_as_asked():
    from dtrain.conditions.classes import Classes
    from dtrain.randomness import Draws, Purpose

    draws = Draws(0)
    u = torch.tensor([draws.uniform(Purpose.LABEL_DROP, k) for k in range(40_000)], dtype=torch.float64)
    classes, batch = Classes(10, dropout=0.1), {"label": torch.arange(40_000) % 10, "drop": u}
    labels = classes.dropped(classes.given(batch), batch)["y"]
    dropped = (labels == 10).double().mean().item()
    assert dropped == pytest.approx(0.1, abs=4 * (0.09 / 40_000) ** 0.5)
    assert torch.equal(labels[labels != 10], (torch.arange(40_000) % 10)[labels != 10])


def test_the_memory_of_importance_is_in_the_checkpoint(digits, tmp_path):
    from dtrain.checkpoint.directory import complete
    from dtrain.checkpoint.format import Checkpoint

    config = tiny(digits, tmp_path, *CHOICES["importance"], "train.steps=30")
    trained(config, 2)
    checkpoint = Checkpoint.open(complete(config.run.path / "checkpoints")[-1])
    counts = checkpoint.tensor("times:counts")
    assert counts.shape == (25,)
    assert counts.max() == SecondMoment.KEPT
    assert checkpoint.tensor("times:history").shape == (25 * SecondMoment.KEPT,)


def test_published_weights_begin_a_run(digits, tmp_path):
    """Exported by their own names and taken up again: the first loss is that of the weights, not of the seed."""
    from pathlib import Path

    from dtrain.checkpoint.export import export
    from dtrain.run import RunDirectory

    first = tiny(digits, tmp_path, "train.steps=30")
    trained(first, 1)
    export(RunDirectory(first.run.path), Path(tmp_path / "out"), None, None, "fp32", "safetensors")
    start = f"run.init_from={tmp_path}/out/model.safetensors"
    for name, overrides in (("a", []), ("b", ["deepspeed.zero_stage=3"])):
        config = tiny(digits, tmp_path, f"run.name={name}", start, "train.steps=1", *overrides)
        trained(config, 2)
        assert losses(config)[0] < 0.8 * losses(first)[0]


def test_the_loss_by_level_is_weighted_as_it_was_drawn_though_the_importance_changes():
    from dtrain.config import Gaussian
    from dtrain.objectives.build import denoising
    from dtrain.objectives.objective import Losses
    from dtrain.training.record.levels import StepLosses

    objective = denoising(Gaussian(timesteps=25, loss="vlb", times="importance"))
    for _ in range(SecondMoment.KEPT):
        objective.times.observe(torch.arange(25), torch.linspace(9, 1, 25))
    step = StepLosses(objective, torch.device("cpu"))
    u = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    place = objective.place(u)
    step.add("main", {"k": torch.arange(200), "time": u}, Losses((1 + place) * objective.times.weights(place), place))
    step.observe(1)
    sums, counts = step.by_level().view(2, -1)
    truth = [(1 + place)[(place * 8).long() == level].mean() for level in range(8)]
    np.testing.assert_allclose(sums / counts, truth)
