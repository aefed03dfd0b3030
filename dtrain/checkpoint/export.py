"""Weights out of a checkpoint, on one process, without DeepSpeed: into a plain module or a safetensors file."""

import json
from pathlib import Path

import torch

from dtrain.checkpoint.directory import complete, step_of, step_path
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.files import replacing
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
    """Write a checkpoint's weights to the folder `out`; a line that says what. Raises UserError.

    safetensors: model.safetensors with the model's own parameter names, and config.json with where from.
    diffusers: transformer or unet, and scheduler, as diffusers' `from_pretrained` reads them.
    """
    from dtrain.models.build import allocate

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    if format not in WRITERS:
        raise UserError(f"--format {format} is not one of {', '.join(WRITERS)}")
    config = run.config()
    if ema is not None and ema >= len(config.ema):
        raise UserError(f"--ema {ema}: {run.path} has {len(config.ema)} EMA profiles, counted from 0")
    checkpoint = open_checkpoint(run, step)
    key = "fp32" if ema is None else f"ema_{ema}"
    module = load_weights(checkpoint, allocate(config), key).to(DTYPES[dtype])
    source = {"run": config.run.name, "step": checkpoint.meta["step"], "images": checkpoint.meta["images"]}
    try:
        written = WRITERS[format](module, config, source | {"weights": key}, out)
    except OSError as e:
        raise UserError(f"cannot write --out {out}: {e.strerror}") from None
    parameters = sum(p.numel() for p in module.parameters())
    return f"{written}: {key} of step {checkpoint.meta['step']}, {parameters:,} parameters"


def _write_safetensors(module: torch.nn.Module, config: Config, source: dict, out: Path) -> Path:
    tree = config.model_dump(mode="json")
    out.mkdir(parents=True, exist_ok=True)
    _save_weights({n: p.detach() for n, p in module.named_parameters()}, source, out / "model.safetensors")
    _save_json(source | {section: tree[section] for section in ("data", "model", "diffusion")}, out / "config.json")
    return out / "model.safetensors"


def _write_diffusers(module: torch.nn.Module, config: Config, source: dict, out: Path) -> Path:
    from dtrain.diffusion.process import build as build_process
    from dtrain.models.diffusers import to_diffusers

    exported = to_diffusers(module, build_process(config.diffusion), config.eval.spacing)
    folder = out / exported.folder
    for place in (folder, out / "scheduler"):
        place.mkdir(parents=True, exist_ok=True)
    _save_weights(exported.weights, source, folder / "diffusion_pytorch_model.safetensors")
    _save_json(exported.config, folder / "config.json")
    _save_json(exported.scheduler, out / "scheduler" / "scheduler_config.json")
    return folder


WRITERS = {"safetensors": _write_safetensors, "diffusers": _write_diffusers}


def _save_weights(weights: dict[str, torch.Tensor], source: dict, path: Path) -> None:
    from safetensors.torch import save

    with replacing(path) as file:  # safetensors' own files are for nobody else to read
        file.write(save({n: w.contiguous() for n, w in weights.items()}, {k: str(v) for k, v in source.items()}))


def _save_json(tree: dict, path: Path) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n")
