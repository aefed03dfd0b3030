"""EDM through the real loop: with a learned uncertainty, and with latents, words and guidance."""

import numpy as np
import pytest

from dtrain.checkpoint.directory import complete
from dtrain.checkpoint.format import Checkpoint
from dtrain.tracking.journal import read
from tests.digits import tiny
from tests.first_stage.folders import save_kl
from tests.training.networks import NETWORKS, TEXT, pack_pairs
from tests.training.runs import trained

LEARNED = ("diffusion={process: edm, stratified: true, uncertainty: learned}", "optim.lr=2e-3")


def lines(config, event):
    return [line["metrics"] for line in read(config.run.path / "journal.jsonl") if line["event"] == event]


def test_a_run_with_a_learned_uncertainty_goes_on_bit_for_bit_and_shows_the_loss_without_it(digits, tmp_path):
    whole = tiny(digits, tmp_path / "whole", *LEARNED, "train.steps=12", "data.batch_size=48")
    expected = trained(whole, 2)
    parts = tiny(digits, tmp_path / "parts", *LEARNED, "train.steps=7", "data.batch_size=48")
    trained(parts, 2)
    again = tiny(digits, tmp_path / "parts", *LEARNED, "train.steps=12", "data.batch_size=48")
    assert trained(again, 2) == expected
    metrics = lines(whole, "train")
    for m in metrics:
        levels = [m[f"loss_level_{i}"] for i in range(8)]  # stratified: six rows of the 48 each
        assert np.mean(levels) == pytest.approx(m["mse"], rel=1e-6)
    assert metrics[0]["uncertainty"] == 0
    assert expected[0] == pytest.approx(metrics[0]["mse"], rel=1e-6)
    assert expected[-1] < metrics[-1]["mse"]  # u has fallen below 0 with ln L
    ends = [Checkpoint.open(complete(config.run.path / "checkpoints")[-1]) for config in (whole, again)]
    weights = [end.tensor("uncertainty/weight:fp32") for end in ends]
    assert np.array_equal(*weights)
    assert np.abs(weights[0]).max() > 0


def test_latents_words_and_guidance_go_with_it_and_are_the_same_on_one_rank_and_two(tmp_path):
    """Told in words and led away from the null by projected guidance with churn, in an autoencoder's latents."""
    pairs, source = pack_pairs(tmp_path / "pairs"), save_kl(tmp_path / "vae", scaling_factor=0.8, shift_factor=0.1)
    chosen = [
        *("data.image_size=16", "data.streams=1", NETWORKS["dit"].replace("patch: 4", "patch: 2")),
        *(f"conditions={{text: {TEXT}}}", f"first_stage={{kind: kl, source: {source}}}"),
        *("diffusion={process: edm, sigma_data: 1.0, uncertainty: learned}", "train.steps=4", "eval.every=4"),
        *("eval.guidance=3", "eval.guidance_orthogonal=1", "eval.guidance_interval=[0.1, 0.9]", "eval.churn=5"),
    ]
    one, two = (
        tiny(pairs, tmp_path / str(ranks), *chosen, f"deepspeed.zero_stage={ranks}", "train.micro_batch=6")
        for ranks in (1, 2)
    )
    assert trained(two, 2) == pytest.approx(trained(one, 1), rel=1e-5)
    (first,), (second,) = (lines(config, "eval") for config in (one, two))
    assert second["fd_pixels"] == pytest.approx(first["fd_pixels"], rel=1e-4)
    assert lines(one, "validation")[0].keys() == {f"loss_level_{i}" for i in range(8)}
