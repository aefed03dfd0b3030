"""Progressive distillation as a run: its losses by hand, at any ranks and stages, and a teacher that stays the same."""

import json
import shutil

import pytest
import torch

import dtrain
from dtrain.checkpoint.export import load_weights, open_checkpoint
from dtrain.data.shards.manifest import load_all
from dtrain.data.stream import Completion, StepDataset
from dtrain.errors import UserError
from dtrain.models.build import allocate
from dtrain.run import RunDirectory
from dtrain.training.check import check_start, warnings
from dtrain.training.record.throughput import training_flops
from tests.digits import losses, tiny
from tests.longer import mostly_longer
from tests.ranks import run_ranks
from tests.training.by_hand import move
from tests.training.runs import train, trained

FLOW, N = "diffusion={process: flow}", 2


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    config = tiny(digits, folder, FLOW, "ema.0.decay=0.5", "train.steps=30", "optim.lr=2e-3", "run.name=teacher")
    trained(config, 1)
    return config.run.path


def student(digits, folder, teacher, *overrides, **keys):
    section = {"kind": "distillation", "teacher": teacher, "steps": N, "guidance": 2.0} | keys
    text = ", ".join(f"{key}: {value}" for key, value in section.items())
    begins = f"run.init_from={teacher}", "run.init_weights=ema", "ema.0.decay=0.5"
    return tiny(digits, folder, FLOW, f"objective={{{text}}}", *begins, *overrides)


def by_hand(config, teacher, steps):
    """Plain PyTorch: two guided Euler steps of a copy that stays, and AdamW on the velocity from their ends."""
    checkpoint = open_checkpoint(RunDirectory(teacher))
    frozen, model = (load_weights(checkpoint, allocate(config), "ema_0") for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=config.optim.betas, weight_decay=0.0)
    data, complete, found = StepDataset(config, load_all(config.data), 0, 1, 0), Completion(config), []
    for step in range(steps):
        batch = complete(data[step])
        y = torch.where(batch["drop"] < 0.1, 10, batch["label"])
        t = (1 - (batch["time"] * N).floor() / N).float().view(-1, 1, 1, 1)
        x_t = (1 - t) * batch["image"] + t * batch["noise"]
        x, h = x_t, 1 / (2 * N)
        with torch.no_grad():
            for now in (t, t - h):
                told = 1000 * now.flatten()
                away, own = (frozen(x, told, y=one) for one in (torch.full_like(y, 10), y))
                x = x - h * (away + 2.0 * (own - away))
        loss = (model(x_t, 1000 * t.flatten(), y=y) - (x_t - x) * N).square().mean()
        rate = config.optim.lr * min(1, (step + 1) / config.optim.warmup_steps)
        move(model, optimizer, loss, rate, config.optim.gradient_clip)
        found.append(loss.item())
    return found


SHAPES = [(stage, ranks) for stage in range(4) for ranks in (1, 2)]


@pytest.mark.parametrize(("stage", "ranks"), mostly_longer(SHAPES, [(3, 2)]))
def test_its_losses_are_those_of_plain_pytorch(digits, tmp_path, teacher, stage, ranks):
    config = student(digits, tmp_path, teacher, f"deepspeed.zero_stage={stage}", "train.steps=50")
    run_ranks(train, ranks, config)
    assert losses(config) == pytest.approx(by_hand(config, teacher, 50), rel=1e-5)
    assert losses(config)[-1] < losses(config)[0]


def test_it_goes_on_bit_for_bit_with_its_teacher_elsewhere_and_with_no_other(digits, tmp_path, teacher):
    often = "train.checkpoint_every=4", "train.keep_last=9", "eval.every=8"
    whole = student(digits, tmp_path / "whole", teacher, *often, "train.steps=8")
    trained(whole, 1)
    half = student(digits, tmp_path / "half", teacher, *often, "train.steps=4")
    trained(half, 1)
    moved = shutil.copytree(teacher, tmp_path / "moved")
    trained(student(digits, tmp_path / "half", moved, *often, "train.steps=8"), 1)
    assert losses(half) == losses(whole)
    manifest = json.loads((half.run.path / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    assert list(manifest["meta"]["held"]) == ["objective.teacher"]
    assert not any("teacher" in name for name in manifest["tensors"])
    line = [json.loads(line) for line in (whole.run.path / "journal.jsonl").read_text().splitlines()]
    (evaluated,) = (one["metrics"] for one in line if one["event"] == "eval")
    assert not any("level" in name for name in evaluated)  # most of them are not trained
    other = student(digits, tmp_path / "half", half.run.path, *often, "train.steps=12")
    (said,) = run_ranks(_refused, 1, other)
    assert "it was trained with another objective.teacher, whose weights it does not hold" in said
    run = dtrain.load(whole.run.path)
    assert run.sample(2, steps=N).shape == (2, 8, 8, 1)
    again = student(digits, tmp_path / "again", whole.run.path, "train.steps=1", steps=1, guidance=1)
    trained(again, 2)  # a student teaches the next


def _refused(config):
    with pytest.raises(UserError) as e:
        train(config)
    return str(e.value)


def test_a_teacher_that_is_asked_otherwise_is_refused_before_anything_starts(digits, tmp_path, teacher):
    v = "diffusion={process: gaussian, prediction: v}"
    never = tiny(digits, tmp_path, FLOW, "diffusion.label_dropout=0", "train.steps=1", "run.name=never")
    trained(never, 1)
    for config, message in (
        (student(digits, tmp_path, teacher, v, "eval.sampler=ddim"), "diffusion.process is flow there, gaussian here"),
        (student(digits, tmp_path, "nowhere"), "objective.teacher=nowhere cannot be used: there is no such run"),
        (student(digits, tmp_path, never.run.path), "but there diffusion.label_dropout is 0"),
    ):
        with pytest.raises(UserError) as e:
            check_start(config, 1)
        assert message in str(e.value)
    assert "1 there" not in check_start(student(digits, tmp_path, never.run.path, guidance=1), 1)


def test_what_cannot_be_distilled_is_refused(digits, tmp_path, teacher):
    cases = {
        ("diffusion={process: edm}", "eval.sampler=heun"): "and diffusion.process is edm; take flow",
        ("diffusion={prediction: eps}", "eval.sampler=ddim"): "prediction eps cannot go with .*few steps begin there",
        ("diffusion={prediction: v, noise: gamma}", "eval.sampler=ddim"): "noise gamma cannot go with",
        ("diffusion={process: flow, times: logit_normal}",): "times logit_normal has no effect on",
        ("diffusion={process: flow, coupling: data}",): "coupling data cannot go with",
        ("eval.guidance=2",): "cannot go with objective.guidance 2, which the network has learned; take 1",
        ("model.num_classes=0",): "objective.guidance 2 needs a model that is told something",
        ("eval.metrics=[bpd_ode]",): "bpd_ode asks at times that objective.kind distillation does not train",
        ("diffusion={prediction: v, timesteps: 21}", "objective.steps=11", "eval.sampler=ddim", "eval.steps=1"): (
            "the teacher takes 22, and diffusion.timesteps is 21; take at most 10"
        ),
    }
    for overrides, message in cases.items():
        with pytest.raises(UserError, match=message):
            student(digits, tmp_path, teacher, *overrides)


def test_what_is_seldom_meant_is_said_and_forwards_of_the_teacher_are_counted(digits, tmp_path, teacher):
    said = "\n".join(warnings(student(digits, tmp_path, teacher, "run.init_from=null", "run.init_weights=null")))
    assert f"random weights, where run.init_from={teacher} begins as its teacher" in said
    said = "\n".join(warnings(student(digits, tmp_path, teacher, "eval.every=1", "eval.steps=5")))
    assert "eval.steps 5: the network is taught a walk of 2 steps" in said
    plain = training_flops(tiny(digits, tmp_path, FLOW))
    assert 3 * training_flops(student(digits, tmp_path, teacher)) == 7 * plain
    assert 3 * training_flops(student(digits, tmp_path, teacher, guidance=1)) == 5 * plain
