"""Weights out of a checkpoint, on one process, without DeepSpeed: into a plain module or a safetensors file."""

import json
from pathlib import Path

import torch

from dtrain.checkpoint.directory import complete, step_of, step_path
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.errors import UserError
from dtrain.run import RunDirectory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_checkpoint(run: RunDirectory, step: int | None = None) -> Checkpoint:
    """A run's newest complete checkpoint, or the one of `step`. Raises UserError for none, or a damaged one."""
    found = complete(run.checkpoints)
    if not found:
        raise UserError(f"{run.path} has no complete checkpoint yet")
    path = found[-1] if step is None else step_path(run.checkpoints, step)
    if path not in found:
        steps = ", ".join(str(step_of(p)) for p in found)
        raise UserError(f"{run.path} has no checkpoint of step {step}; there are: {steps}")
    try:
        return Checkpoint.open(path)
    except Damaged as e:
        raise UserError(f"the checkpoint is damaged: {e}") from None


@torch.no_grad()
def load_weights(checkpoint: Checkpoint, module: torch.nn.Module, key: str) -> torch.nn.Module:
    """Fill a module with a checkpoint's "fp32" weights or one of its EMAs ("ema_0"); frozen parameters have only fp32.

    Raises UserError when the checkpoint is damaged or holds no such weights.
    """
    try:
        for name, p in module.named_parameters():
            values = checkpoint.tensor(f"{name}:{key if p.requires_grad else 'fp32'}")
            p.copy_(torch.from_numpy(values).view(p.shape))
    except Damaged as e:
        raise UserError(f"the checkpoint is damaged: {e}") from None
    except KeyError as e:
        raise UserError(f"{checkpoint.path} holds no {e.args[0]}") from None
    return module


def export(run: RunDirectory, out: Path, step: int | None, ema: int | None, dtype: str, format: str) -> str:
    """Write `out`/model.safetensors with the model's own parameter names, and `out`/config.json with where from."""
    from safetensors.torch import save_file

    from dtrain.models.build import allocate

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    if format != "safetensors":
        raise UserError(f"--format {format} is not known; there is: safetensors")
    config = run.config()
    checkpoint = open_checkpoint(run, step)
    key = "fp32" if ema is None else f"ema_{ema}"
    module = load_weights(checkpoint, allocate(config), key)
    source = {
        "run": config.run.name,
        "step": checkpoint.meta["step"],
        "images": checkpoint.meta["images"],
        "weights": key,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = out / "model.safetensors"
        tensors = {name: p.detach().to(DTYPES[dtype]).contiguous() for name, p in module.named_parameters()}
        save_file(tensors, file, metadata={k: str(v) for k, v in source.items()})
        tree = config.model_dump(mode="json")
        kept = {section: tree[section] for section in ("data", "model", "diffusion")}
        (out / "config.json").write_text(json.dumps(source | kept, indent=1) + "\n")
    except OSError as e:
        raise UserError(f"cannot write --out {out}: {e.strerror}") from None
    return f"{file}: {key} of step {checkpoint.meta['step']}, {sum(p.numel() for p in tensors.values()):,} parameters"
