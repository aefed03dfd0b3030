"""A training of a control network: the base stays what it was and out of checkpoints, in every shape."""

import numpy as np
import pytest
import torch
from PIL import Image

import dtrain
from dtrain.checkpoint.frozen_base import fingerprint, open_base, read_base
from dtrain.errors import UserError
from tests.command_line import command
from tests.digits import losses, tiny
from tests.ranks import run_ranks
from tests.training.control import controlled, evaluations, file_of, newest, unet
from tests.training.runs import train, trained


@pytest.fixture(scope="module")
def base(finished_run):
    return finished_run.run.path


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory, base):
    config = controlled(digits, tmp_path_factory.mktemp("control"), base)
    trained(config, 1)
    return config


def test_at_stage_3_on_two_ranks_it_is_the_same_training(digits, tmp_path, base, run):
    config = controlled(digits, tmp_path, base, "deepspeed.zero_stage=3", "train.micro_batch=6")
    assert trained(config, 2) == pytest.approx(losses(run), rel=1e-5)
    assert evaluations(config).keys() == evaluations(run).keys() == {6}
    for step, metrics in evaluations(run).items():
        assert evaluations(config)[step] == pytest.approx(metrics, rel=1e-4)


def test_checkpoints_hold_the_copy_alone_and_the_base_is_what_it_was(base, run):
    checkpoint = newest(run)
    assert {name.partition(".")[0] for name in checkpoint.tensors} == {"copies"}
    before = read_base(str(base), run.base)
    assert checkpoint.meta["held"] == {"base": fingerprint(before)}
    moments = [name for name in checkpoint.tensors if name.endswith(":exp_avg")]
    assert moments
    joins = checkpoint.tensor("copies.ink.joins.0.weight:fp32")
    assert joins.any()  # it has begun to move


def test_it_goes_on_bit_for_bit(digits, tmp_path, base, run):
    config = controlled(digits, tmp_path, base, "train.steps=3")
    run_ranks(train, 1, config)
    run_ranks(train, 1, controlled(digits, tmp_path, base))
    ours, theirs = newest(config), newest(run)
    assert ours.meta["step"] == theirs.meta["step"] == 6
    for name in theirs.tensors:
        assert np.array_equal(ours.tensor(name), theirs.tensor(name)), name
    assert evaluations(config)[6] == evaluations(run)[6]


def test_a_unet_on_the_weights_of_a_file_in_two_shapes(digits, tmp_path):
    file = file_of(tiny(digits, tmp_path, unet()), tmp_path / "base.safetensors")
    found = []
    for shape in (("deepspeed.zero_stage=0", "run.name=one"), ("deepspeed.zero_stage=2", "run.name=two")):
        config = controlled(digits, tmp_path, file, unet(f"control_of: {file}"), *shape)
        found.append((trained(config, len(found) + 1), evaluations(config)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == {step: pytest.approx(metrics, rel=1e-4) for step, metrics in found[0][1].items()}


def test_without_scale_samples_are_the_bases_bit_for_bit_and_with_it_others(base, run, tmp_path):
    picture = tmp_path / "ink.png"
    Image.fromarray(np.kron(np.eye(4, dtype=np.uint8) * 255, np.ones((2, 2), np.uint8))).save(picture)
    ours, theirs = dtrain.load(run.run.path), dtrain.load(base)
    how = {"n": 6, "steps": 3, "seed": 5}
    bare = theirs.sample(**how)
    assert np.array_equal(ours.sample(**how, pictures=picture, control_scale=0), bare)
    assert np.array_equal(ours.sample(**how), bare)  # told nothing
    told = ours.sample(**how, pictures=picture)
    assert not np.array_equal(told, bare)
    assert np.array_equal(ours.sample(**how, pictures=picture, as_is=True), told)  # a mask's mask is itself
    guessed = ours.sample(**how, pictures=picture, guidance=2, guess_mode=True)
    assert not np.array_equal(guessed, ours.sample(**how, pictures=picture, guidance=2))


def test_the_command_draws_what_python_draws(run, tmp_path):
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "one.png")
    out = tmp_path / "out.npz"
    options = ["--picture", f"ink={tmp_path}/one.png", "--n", "3", "--steps", "2", "--control-scale", "0.5"]
    [(code, said)] = run_ranks(command, 1, "sample", run.run.path, *options, "--out", out)
    assert not code, said
    expected = dtrain.load(run.run.path).sample(3, pictures=tmp_path / "one.png", steps=2, control_scale=0.5)
    assert np.array_equal(np.load(out)["images"], expected)


def test_another_base_is_refused(digits, tmp_path, base, run):
    plain = tiny(digits, tmp_path)
    other = file_of(plain, tmp_path / "other.safetensors")
    config = run.model_copy(update={"model": run.model.model_copy(update={"control_of": str(other)})})
    with pytest.raises(UserError, match="trained with another base"):
        open_base(config, torch.device("cpu")).check_of_checkpoint(newest(run).meta["held"])
    for overrides, message in (
        (("model.width=64",), "model.width is 32 there, 64 here"),
        (("diffusion.prediction=v",), "diffusion.prediction is eps there, v here"),
    ):
        with pytest.raises(UserError, match=message):
            read_base(str(base), tiny(digits, tmp_path, *overrides))
    with pytest.raises(UserError, match=r"the base nowhere cannot be used: there is no such run, checkpoint or file"):
        read_base("nowhere", plain)


def test_weights_that_change_in_memory_are_noticed(run):
    held = open_base(run, torch.device("cpu"))
    held.check()
    weight = held.module.get_parameter("blocks.0.mlp.fc1.weight")
    with torch.no_grad():
        weight[0, 0] += 1
        with pytest.raises(UserError, match="have changed in memory"):
            held.check()
        weight[0, 0] -= 1


def test_an_exported_folder_draws_the_same_and_the_plan_counts_the_base(digits, run, tmp_path):
    from dtrain.checkpoint.export import export
    from dtrain.cluster.plan import plan
    from dtrain.run import RunDirectory

    export(RunDirectory(run.run.path), tmp_path / "out", None, 0, "fp32", "safetensors")
    ours, theirs = dtrain.load(tmp_path / "out"), dtrain.load(run.run.path)
    assert np.array_equal(ours.sample(4, steps=2), theirs.sample(4, steps=2))
    for format, why in (("published", "no place for weights without their base"), ("diffusers", "other transformers")):
        with pytest.raises(UserError, match=why):
            export(RunDirectory(run.run.path), tmp_path / "other", None, 0, "fp32", format)
    planned = plan(run, 1, 2, 80, 0.4, None)
    assert planned.base == sum(4 * p.numel() for p in read_base(str(run.model.control_of), run.base).parameters())
    assert planned.parameters == sum(p.numel() for p in theirs.model.parameters() if p.requires_grad)
