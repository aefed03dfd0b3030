"""Trainings of a control network on the base that the fixture `finished_run` is, or on a small UNet in a file."""

import torch
from safetensors.torch import save_file

from dtrain.checkpoint.format import Checkpoint
from dtrain.models.build import build
from dtrain.tracking.journal import read
from tests.digits import tiny

MASK = ("conditions.ink.kind=picture", "conditions.ink.operator=mask", "conditions.ink.grid=4")


def unet(*more):
    """Overrides that make the model a small UNet. more: further keys."""
    keys = "name: unet, width: 8, multipliers: [1, 2], res_blocks: 1, attention: [4], dropout: 0.2, num_classes: 10"
    return f"model={{{', '.join((keys, *more))}}}"


def controlled(digits, folder, base, *overrides):
    """A run of 6 steps, saved after 3 and 6 and evaluated after 6, its base a path."""
    own = ("train.steps=6", "train.checkpoint_every=3", "eval.every=6", "ema.0.decay=0.5", "optim.lr=5e-3")
    own += ("eval.num_samples=24", "eval.steps=3", "eval.validation_images=24")
    return tiny(digits, folder, *own, f"model.control_of={base}", *MASK, *overrides)


def file_of(config, path):
    """The weights of a config's model, none of them zero, in a file."""
    with torch.device("cpu"):
        model = build(config)
    torch.manual_seed(0)
    save_file({name: (p + 0.05 * torch.randn(p.shape)).detach() for name, p in model.named_parameters()}, path)
    return path


def evaluations(config):
    """Step → its metrics, without what a clock says."""
    lines = [e for e in read(config.run.path / "journal.jsonl") if e["event"] == "eval"]
    return {e["step"]: {k: v for k, v in e["metrics"].items() if k != "seconds"} for e in lines}


def newest(config):
    return Checkpoint.open(max((config.run.path / "checkpoints").glob("step-*")))
