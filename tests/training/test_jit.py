"""Trainings of a DiT with JiT's options that predicts x_0: the same on other ranks and stages, resumed bit for bit."""

import numpy as np
import pytest

import dtrain
from dtrain.checkpoint.export import export
from dtrain.run import RunDirectory
from tests.digits import losses
from tests.longer import longer, mostly_longer
from tests.ranks import run_ranks
from tests.training.control import evaluations, newest
from tests.training.jit import ALL, OPTIONS, of_jit
from tests.training.runs import train, trained

CHOICES = {"none": (), **OPTIONS, "all": ALL}
SHAPES = [(ranks, stage) for ranks in (1, 2) for stage in (0, 3)]


@pytest.fixture(scope="module")
def reference(digits, tmp_path_factory):
    """Options → a run with them at stage 0 on one rank."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = of_jit(digits, tmp_path_factory.mktemp(name), *CHOICES[name], "deepspeed.zero_stage=0")
            trained(made[name], 1)
        return made[name]

    return run


def same(config, theirs):
    assert losses(config) == pytest.approx(losses(theirs), rel=1e-5)
    assert evaluations(config)[16] == pytest.approx(evaluations(theirs)[16], rel=1e-3)


CASES = [(name, *shape) for name in CHOICES for shape in SHAPES if shape != (1, 0)]


@pytest.mark.parametrize(("name", "ranks", "stage"), mostly_longer(CASES, [("all", 2, 3), ("none", 2, 0)]))
def test_losses_and_distances_are_the_same_on_other_ranks_and_stages(digits, tmp_path, reference, name, ranks, stage):
    config = of_jit(digits, tmp_path, *CHOICES[name], f"deepspeed.zero_stage={stage}")
    trained(config, ranks)
    same(config, reference(name))
    assert len(set(losses(config))) == 16


HOW = ["train.activation_checkpointing=true", longer("train.compile=blocks"), longer("train.micro_batch=4")]


@pytest.mark.parametrize("how", HOW)
def test_recomputed_compiled_and_in_micro_batches_it_is_the_same_training(digits, tmp_path, reference, how):
    config = of_jit(digits, tmp_path, *ALL, how, "deepspeed.zero_stage=3")
    run_ranks(train, 1, config, timeout=600)  # compiling takes its time
    same(config, reference("all"))


@pytest.mark.parametrize(
    ("name", "ranks", "stage"), mostly_longer([(n, *s) for n in CHOICES for s in SHAPES], [("all", 1, 3)])
)
def test_it_goes_on_bit_for_bit(digits, tmp_path, name, ranks, stage):
    own = (*CHOICES[name], f"deepspeed.zero_stage={stage}")
    whole, stopped = (of_jit(digits, tmp_path / run, *own) for run in ("whole", "stopped"))
    run_ranks(train, ranks, whole)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train, ranks, stopped, environment={"DTRAIN_FAULTS": "sigkill at=step step=10"})
    run_ranks(train, ranks, stopped)
    ours, theirs = newest(stopped), newest(whole)
    assert ours.meta["step"] == theirs.meta["step"] == 16
    for tensor in theirs.tensors:
        assert np.array_equal(ours.tensor(tensor), theirs.tensor(tensor)), tensor
    assert losses(stopped) == losses(whole)
    assert evaluations(stopped)[16] == evaluations(whole)[16]


def test_the_exported_weights_draw_what_the_run_draws(reference, tmp_path):
    run = reference("all").run.path
    export(RunDirectory(run), tmp_path / "out", None, 0, "fp32", "safetensors")
    drawn, again = (dtrain.load(place).sample(6, steps=3, guidance=2) for place in (run, tmp_path / "out"))
    assert np.array_equal(drawn, again)


def test_a_picture_controls_it_and_low_rank_adapters_adapt_it(digits, tmp_path, reference):
    """Both begin as their base: the first loss of each is that of the base's own averaged weights."""
    run = reference("all").run.path
    found = []
    for name, keys in {
        "control": ("conditions.ink={kind: picture, operator: mask, grid: 4}", f"model.control_of={run}"),
        "adapt": (f"model.adapt={{of: {run}, rank: 4}}",),
    }.items():
        for ranks, stage in ((1, 0), (2, 3)):
            shape = ("train.steps=2", "eval.every=0", f"deepspeed.zero_stage={stage}")
            found.append(trained(of_jit(digits, tmp_path / f"{name}{ranks}", *ALL, *keys, *shape), ranks))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[2] == pytest.approx(found[3], rel=1e-5)
    assert found[0][0] == pytest.approx(found[2][0], rel=1e-5)
    assert found[0] != found[2]
