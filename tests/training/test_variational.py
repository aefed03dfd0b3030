"""Variational diffusion through the whole training: the same at any number of ranks, its bound in each evaluation."""

import pytest

from dtrain.tracking.journal import read
from tests.digits import tiny
from tests.longer import mostly_longer
from tests.training.runs import trained

CHOICES = {
    "continuous": ["diffusion={process: vdm, stratified: true}"],
    "chain": ["diffusion={process: vdm, timesteps: 20}"],
}
SHORT = ["train.steps=8", "eval.every=8", "eval.metrics=[fd, bpd]", "eval.validation_images=150", "eval.num_samples=24"]


def numbers(config):
    """Losses by step, and the numbers of the last evaluation and of its validation."""
    lines = read(config.run.path / "journal.jsonl")
    by_event = {e["event"]: e["metrics"] for e in lines}
    return [e["metrics"] for e in lines if e["event"] == "train"], by_event["eval"], by_event["validation"]


@pytest.mark.parametrize("name", mostly_longer(CHOICES, ["continuous"]))
def test_losses_and_bounds_are_the_same_on_one_rank_and_two(digits, tmp_path, name):
    found = []
    for world_size in (1, 2):
        config = tiny(digits, tmp_path / str(world_size), *CHOICES[name], *SHORT, "train.micro_batch=6")
        trained(config, world_size)
        steps, evaluation, validation = numbers(config)
        for step in steps:
            parts = [step[f"bound_{part}"] for part in ("prior", "chain", "decoder")]
            assert step["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert evaluation["bpd"] == pytest.approx(sum(evaluation[f"bpd_{p}"] for p in ("prior", "chain", "decoder")))
        found.append([step["loss"] for step in steps] + [evaluation["bpd"], *validation.values()])
    assert found[0] == pytest.approx(found[1], rel=2e-4)
