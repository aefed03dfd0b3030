"""A training of low-rank adapters: the base stays what it was and out of checkpoints; exported, merged, drawn with."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dtrain
from dtrain.checkpoint.export import export
from dtrain.checkpoint.frozen_base import fingerprint, load_merged, read_base
from dtrain.errors import UserError
from dtrain.run import RunDirectory
from tests.digits import losses
from tests.ranks import run_ranks
from tests.training.control import evaluations, newest
from tests.training.lora import adapted
from tests.training.runs import train, trained


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory, finished_run):
    config = adapted(digits, tmp_path_factory.mktemp("adapted"), finished_run.run.path)
    trained(config, 1)
    return config


def test_at_stage_3_on_two_ranks_it_is_the_same_training(digits, tmp_path, finished_run, run):
    config = adapted(digits, tmp_path, finished_run.run.path, "deepspeed.zero_stage=3", "train.micro_batch=6")
    assert trained(config, 2) == pytest.approx(losses(run), rel=1e-5)
    assert evaluations(config)[6] == pytest.approx(evaluations(run)[6], rel=1e-3)


def test_it_goes_on_bit_for_bit_and_checkpoints_hold_the_adapters_alone(digits, tmp_path, finished_run, run):
    config = adapted(digits, tmp_path, finished_run.run.path, "train.steps=3")
    run_ranks(train, 1, config)
    run_ranks(train, 1, adapted(digits, tmp_path, finished_run.run.path))
    ours, theirs = newest(config), newest(run)
    assert ours.meta["step"] == theirs.meta["step"] == 6
    assert {name.rpartition(".weight:")[0].rpartition(".")[2] for name in theirs.tensors} == {"A", "B"}
    for name in theirs.tensors:
        assert np.array_equal(ours.tensor(name), theirs.tensor(name)), name
    assert theirs.meta["held"] == {"base": fingerprint(read_base(str(finished_run.run.path), run.base))}
    assert theirs.tensor("layers.blocks.0.attn.qkv.B.weight:fp32").any()


def test_merged_it_draws_the_same_without_the_base(run, tmp_path):
    export(RunDirectory(run.run.path), tmp_path / "merged", None, 0, "fp32", "safetensors", merge=load_merged)
    merged, ours = dtrain.load(tmp_path / "merged"), dtrain.load(run.run.path)
    assert merged.config.base_source is None
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 5, 400, 999]), torch.tensor([0, 1, 2, 10])
    with torch.no_grad():
        assert torch.allclose(merged.model(x, t, y), ours.model(x, t, y), atol=1e-5)
        assert not torch.allclose(ours.model.base(x, t, y), ours.model(x, t, y), atol=1e-3)
    apart = np.abs(merged.sample(8, steps=3).astype(int) - ours.sample(8, steps=3))
    assert apart.max() <= 1


def test_diffusers_gets_a_and_b_of_each_of_its_layers(run, finished_run, tmp_path):
    """The base as diffusers has it, with lora_B lora_A added by hand, answers as the adapted network does."""
    from diffusers import DiTTransformer2DModel

    export(RunDirectory(finished_run.run.path), tmp_path / "base", None, 0, "fp32", "diffusers")
    export(RunDirectory(run.run.path), tmp_path / "lora", None, 0, "fp32", "diffusers")
    lora = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "base" / "transformer")
    ours = dtrain.load(run.run.path)
    layers = {name.removesuffix(".lora_A.weight") for name in lora if name.endswith("A.weight")}
    assert len(layers) == 6 * len(theirs.transformer_blocks)  # to_q, to_k, to_v, to_out and two of the perceptron
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 5, 400, 999]), torch.tensor([0, 1, 2, 10])
    with torch.no_grad():
        for layer in layers:
            weight = theirs.get_parameter(f"{layer.removeprefix('transformer.')}.weight")
            weight += lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
        answer = theirs(x, timestep=t, class_labels=y).sample
        assert torch.allclose(answer, ours.model(x, t, y), atol=1e-4)


def test_what_cannot_be_is_refused(digits, run, finished_run, tmp_path):
    folder = RunDirectory(run.run.path)
    with pytest.raises(UserError, match="take --format safetensors, or --merge"):
        export(folder, tmp_path / "x", None, 0, "fp32", "published")
    with pytest.raises(UserError, match=r"--merge is of a run with model\.adapt"):
        export(RunDirectory(finished_run.run.path), tmp_path / "x", None, 0, "fp32", "safetensors", merge=load_merged)
    with pytest.raises(UserError, match=r"train\.activation_checkpointing has no way"):
        adapted(digits, tmp_path, "runs/x", "train.activation_checkpointing=true")
