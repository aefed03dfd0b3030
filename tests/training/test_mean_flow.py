"""MeanFlow through the whole training: forwards without gradient at every stage, the same at any number of ranks."""

import numpy as np
import pytest

import dtrain
from dtrain.checkpoint.export import export
from dtrain.errors import UserError
from dtrain.run import RunDirectory
from tests.digits import losses, tiny
from tests.longer import mostly_longer
from tests.training.runs import trained

MEAN_FLOW = "diffusion={process: meanflow, span_share: 0.75}"
IMPROVED = "diffusion={process: meanflow, span_share: 0.75, along: network}"
SHORT = ("train.steps=12", "train.checkpoint_every=4", "ema.0.decay=0.5", "eval.steps=1", "train.keep_last=9")
CHOICES = {
    "1 rank": (1, 0, ()),
    "2 ranks, stage 0": (2, 0, ()),
    "2 ranks, stage 1": (2, 1, ()),
    "2 ranks, stage 2": (2, 2, ()),
    "2 ranks, stage 3": (2, 3, ()),
    "improved": (2, 3, (IMPROVED,)),
    "recomputed": (1, 1, ("train.activation_checkpointing=true",)),
}


@pytest.fixture(scope="module")
def alone(digits, tmp_path_factory):
    config = tiny(digits, tmp_path_factory.mktemp("alone"), MEAN_FLOW, *SHORT, "train.micro_batch=6", "eval.every=12")
    trained(config, 1)
    return config


@pytest.mark.parametrize("name", mostly_longer(CHOICES, ["2 ranks, stage 3"]))
def test_losses_are_the_same_on_any_ranks_and_stages(digits, alone, tmp_path, name):
    world_size, stage, more = CHOICES[name]
    shape = ("train.micro_batch=6", f"deepspeed.zero_stage={stage}")
    config = tiny(digits, tmp_path / "run", MEAN_FLOW, *SHORT, *shape, *more)
    trained(config, world_size)
    expected = alone
    if IMPROVED in more:
        expected = tiny(digits, tmp_path / "alone", IMPROVED, *SHORT, "train.micro_batch=6")
        trained(expected, 1)
    np.testing.assert_allclose(losses(config), losses(expected), rtol=2e-4)


def test_it_goes_on_bit_for_bit_and_draws_in_one_step(digits, alone, tmp_path):
    half = tiny(digits, tmp_path, MEAN_FLOW, *SHORT, "train.micro_batch=6", "train.steps=4")
    trained(half, 1)
    trained(tiny(digits, tmp_path, MEAN_FLOW, *SHORT, "train.micro_batch=6"), 1)
    assert losses(half) == losses(alone)
    run = dtrain.load(alone.run.path)
    one, four = run.sample(4, steps=1), run.sample(4, steps=4)
    assert one.shape == (4, 8, 8, 1)
    assert np.abs(one.astype(int) - four).max() > 0
    assert run.invert(one, steps=4).noise.shape == (4, 1, 8, 8)


@pytest.mark.parametrize("name", mostly_longer({"bf16_autocast": None}, []))
def test_under_autocast_the_difference_is_taken_without_it(digits, alone, tmp_path, name):
    config = tiny(digits, tmp_path, MEAN_FLOW, *SHORT, "train.micro_batch=6", f"deepspeed.precision={name}")
    trained(config, 1)
    np.testing.assert_allclose(losses(config), losses(alone), rtol=2e-2)


def test_what_has_no_place_for_two_times_refuses_it(digits, alone, tmp_path):
    run = RunDirectory(alone.run.path)
    with pytest.raises(UserError, match="told two times; take --format safetensors"):
        export(run, tmp_path / "out", None, 0, "fp32", "diffusers")
    cases = {
        "model={name: unet, width: 16, multipliers: [1, 2], attention: [4], num_classes: 10}": "take dit or mmdit",
        "deepspeed.precision=bf16": "would round to noise",
        "eval.guidance=2": "cannot go with diffusion.process meanflow",
        "eval.sampler=heun": "does not walk a meanflow process",
    }
    for override, message in cases.items():
        with pytest.raises(UserError, match=message):
            tiny(digits, tmp_path, MEAN_FLOW, override)


GUIDED = "diffusion={process: meanflow, span_share: 0.75, guidance: 2.5, guidance_mix: 0.5, guidance_from: 144}"
BEGINS = 6  # steps of 24 images


@pytest.mark.parametrize("name", mostly_longer(["2 ranks, stage 3", "2 ranks, stage 1"], ["2 ranks, stage 3"]))
def test_guidance_is_built_in_from_an_image_on_at_any_ranks_and_across_a_stop(digits, alone, tmp_path, name):
    shape = (*SHORT, "train.micro_batch=6")
    one = tiny(digits, tmp_path / "one", GUIDED, *shape)
    trained(one, 1)
    assert losses(one)[:BEGINS] == losses(alone)[:BEGINS]
    assert losses(one)[BEGINS] != losses(alone)[BEGINS]
    world_size, stage, _ = CHOICES[name]
    two = tiny(digits, tmp_path / "two", GUIDED, *shape, f"deepspeed.zero_stage={stage}")
    trained(two, world_size)
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-4)
    half = tiny(digits, tmp_path / "half", GUIDED, *shape, "train.steps=4")
    trained(half, 1)
    trained(tiny(digits, tmp_path / "half", GUIDED, *shape), 1)
    assert losses(half) == losses(one)


def test_guidance_that_cannot_be_learned_is_refused_and_its_forwards_are_counted(digits, tmp_path):
    cases = {
        "guidance_from: 9": "guidance_from 9 has no effect with guidance 1; take guidance 2",
        "guidance: 2, label_dropout: 0": "diffusion.label_dropout is 0, so no row is trained without; take 0.1",
    }
    for more, message in cases.items():
        with pytest.raises(UserError, match=message):
            tiny(digits, tmp_path, f"diffusion={{process: meanflow, {more}}}")
    with pytest.raises(UserError, match=r"model\.num_classes is 0; take guidance 1"):
        tiny(digits, tmp_path, "diffusion={process: meanflow, guidance: 2}", "model.num_classes=0")
    forwards = {"guidance: 2": 3, "guidance: 2, guidance_mix: 0.5": 4, "along: network, guidance: 2": 4}
    for more, number in forwards.items():
        found = tiny(digits, tmp_path, f"diffusion={{process: meanflow, {more}}}")
        assert found.diffusion.further_forwards == number
    assert tiny(digits, tmp_path, IMPROVED).diffusion.further_forwards == 3
