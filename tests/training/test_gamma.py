"""Gamma noise through the real loop, at any number of ranks."""

import numpy as np
import pytest

from dtrain.tracking.journal import read
from tests.digits import tiny
from tests.training.runs import trained


def test_gamma_noise_is_the_same_on_one_rank_and_two_in_training_and_in_samples(digits, tmp_path):
    chosen = "diffusion.noise=gamma", "diffusion.theta_0=0.008", "eval.sampler=ancestral", "train.steps=4"
    one, two = (
        tiny(digits, tmp_path / str(ranks), *chosen, "eval.every=4", f"train.micro_batch={24 // ranks // ranks}")
        for ranks in (1, 2)
    )
    found = trained(one, 1)
    assert trained(two, 2) == pytest.approx(found, rel=1e-5)
    assert found != trained(tiny(digits, tmp_path / "normal", "train.steps=4"), 1)
    (first,), (second,) = (
        [e["metrics"]["fd_pixels"] for e in read(config.run.path / "journal.jsonl") if e["event"] == "eval"]
        for config in (one, two)
    )
    assert np.isfinite(first)
    assert second == pytest.approx(first, rel=1e-4)
