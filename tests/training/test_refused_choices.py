"""Choices that would end in a number without a meaning: refused or said before a run or an evaluation begins."""

import pytest

from dtrain.config import load
from dtrain.data.pack.pack import pack
from dtrain.data.shards.manifest import load_all
from dtrain.errors import UserError
from dtrain.evaluation.requirements import check_evaluation, check_guidance
from dtrain.training.check import check_inputs, check_start, warnings
from tests.digits import tiny


def test_an_average_that_is_still_the_untrained_weights_is_said_with_one_that_would_fit(digits, tmp_path):
    long = tiny(digits, tmp_path, "train.steps=300", "ema=[{decay: 0.9999}, {decay: 0.95}]")
    (line,) = warnings(long)
    assert line.startswith("ema.0.decay 0.9999 after 300 steps is still 97% the untrained weights")
    assert "0.9667 would average the last tenth" in line
    assert line in check_start(long, 1)
    assert warnings(tiny(digits, tmp_path, "train.steps=300", "ema=[{decay: 0.9667}]")) == []


def test_guidance_needs_a_model_that_was_trained_without_labels_too(digits, tmp_path):
    config = tiny(digits, tmp_path, "eval.guidance=2", "diffusion.label_dropout=0", "eval.every=10")
    with pytest.raises(UserError, match=r"eval.guidance 2.0 contrasts the model with itself without a class"):
        check_inputs(config, load_all(config.data))
    both = "diffusion.label_dropout=0", "conditions={text: {length: 8}}"
    check_guidance(tiny(digits, tmp_path, *both, "eval.guidance={label: 1, text: 3}"))  # always told its class
    with pytest.raises(
        UserError, match=r"eval.guidance text=3,label=1 contrasts the model with itself without a class"
    ):
        check_guidance(tiny(digits, tmp_path, *both, "eval.guidance={text: 3, label: 1}"))
    with pytest.raises(UserError, match=r"diffusion.label_dropout 1 never shows the model a label"):
        check_start(tiny(digits, tmp_path, "diffusion.label_dropout=1"), 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.num_samples=1"], "eval.num_samples 1: one sample has no spread"),
        (["eval.metrics=[kid]", "eval.num_samples=1"], "eval.num_samples 1: one sample has no spread"),
        (["HOLDOUT=1"], "the held-out split has 1 image, and one has no spread"),
        (["HOLDOUT=1", "eval.metrics=[kid]"], "the held-out split has 1 image"),
        (["HOLDOUT=3", "eval.metrics=[precision]"], "precision and recall need more than 3 held-out images, not 3"),
    ],
)
def test_too_few_images_to_compare_are_refused_before_sampling(digits, tmp_path, overrides, message):
    (held_out,) = [o.partition("=")[2] for o in overrides if o.startswith("HOLDOUT")] or ["0"]
    chosen = [o for o in overrides if not o.startswith("HOLDOUT")]
    if held_out != "0":
        pack("sklearn:digits", tmp_path / "few", holdout=int(held_out))
        chosen.append(f"data.holdout={tmp_path}/few/holdout/manifest.json")
    with pytest.raises(UserError, match=message):
        check_evaluation(tiny(digits, tmp_path, *chosen))


def test_a_split_of_four_is_enough_for_precision(digits, tmp_path):
    pack("sklearn:digits", tmp_path / "few", holdout=4)
    held_out = f"data.holdout={tmp_path}/few/holdout/manifest.json"
    check_evaluation(tiny(digits, tmp_path, held_out, "eval.metrics=[precision, kid, fd]"))


def test_shipped_configs_have_averages_that_fit_their_steps():
    for name in ("digits-dit", "digits-unet", "cifar10-small"):
        assert warnings(load(f"configs/{name}.yaml")) == []
