"""A training of joint attention, told two texts: alike on one rank and two, exported and drawn from again."""

import numpy as np
import pytest
import torch

import dtrain
from dtrain.checkpoint.export import export
from dtrain.errors import UserError
from dtrain.run import RunDirectory
from tests.command_line import command
from tests.digits import losses
from tests.ranks import run_ranks
from tests.training.networks import pack_pairs, told_in_words
from tests.training.runs import trained


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return pack_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory):
    config = told_in_words(pairs, tmp_path_factory.mktemp("one"), "mmdit", "train.steps=4")
    trained(config, 1)
    return config


def test_the_losses_are_equal_on_one_rank_and_two(run, pairs, tmp_path):
    """Other ranks, another stage, and activations that are recomputed."""
    own = "train.steps=4", "deepspeed.zero_stage=3", "train.activation_checkpointing=true"
    found = trained(told_in_words(pairs, tmp_path, "mmdit", *own), 2)
    assert np.allclose(found, losses(run), rtol=0, atol=1e-5)
    assert len(set(found)) == 4


def test_it_is_exported_to_its_own_names_and_diffusers_is_refused(run, tmp_path):
    place = RunDirectory(run.run.path)
    export(place, tmp_path / "out", None, 0, "fp32", "safetensors")
    assert (tmp_path / "out" / "README.md").read_text().count("MMDiT")
    asked = {"prompts": ["a one", "a two"], "steps": 2, "guidance": 2}
    drawn, again = (dtrain.load(where).sample(**asked) for where in (run.run.path, tmp_path / "out"))
    assert np.array_equal(drawn, again)
    with pytest.raises(UserError, match=r"diffusers has no part for this run.s .*conditions"):
        export(place, tmp_path / "diffusers", None, 0, "fp32", "diffusers")


def test_guidance_over_each_of_the_texts_apart_is_asked_for_by_command_and_in_python(run, tmp_path):
    place, asked = str(run.run.path), {"prompts": ["a one", "a two"], "steps": 2}
    model = dtrain.load(place)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.model.named_parameters():  # four steps have hardly begun to attend
        if "adaLN" in name or "final_layer" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    plain, apart, other = (
        model.sample(**asked, guidance=guidance) for guidance in (3, {"text": 3, "whole": 3}, {"whole": 3, "text": 1})
    )
    assert np.array_equal(plain, apart)
    assert not np.array_equal(plain, other)
    with pytest.raises(UserError, match=r"eval.guidance names words, and this model is told text and whole"):
        model.sample(**asked, guidance="words=3")
    how = "--prompt", "a one", "--steps", 2, "--guidance", "whole=3,text=1.5", "--out", tmp_path / "a.npz"
    results = run_ranks(command, 1, "sample", place, *how)
    assert results[0][0] == 0, results
    own = dtrain.load(place).sample(prompts="a one", steps=2, guidance={"whole": 3, "text": 1.5})
    assert np.array_equal(np.load(tmp_path / "a.npz")["images"], own)
