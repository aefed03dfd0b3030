"""Weights that somebody published or trained elsewhere, by the model's own names, loaded without running code."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dtrain.errors import UserError
from dtrain.models.dit import DiT
from dtrain.models.time_turned import time_turned, without_variance
from dtrain.models.weight_file import Which, is_own, read_weights

Model = TypeVar("Model", bound=nn.Module)


def load_published(model: Model, path: str | Path, which: Which | None = None, data_at_one: str | None = None) -> Model:
    """Copy a state dict in a file into a model of the same architecture; returns it.

    which: of a file that holds averaged and raw weights. data_at_one: the file's network, unless dtrain wrote it, is
    told t in [0, 1] with data at 1, as SiT's are, and predicts this: velocity or x0. Positions are frozen sines and
    cosines: for another image size the model keeps its own. Raises UserError for a file that holds no plain state dict,
    or whose names or shapes are not the model's.
    """
    found, wanted = published(model, path, which, data_at_one), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])
    return model


def published(
    model: nn.Module, path: str | Path, which: Which | None = None, data_at_one: str | None = None
) -> dict[str, Tensor]:
    """The weights in a file for each parameter of a model, which may lie on `meta`. Raises as `load_published`."""
    wanted = dict(model.named_parameters())
    found = read_weights(path, which)
    if "pos_embed" in wanted and "pos_embed" in found and found["pos_embed"].shape != wanted["pos_embed"].shape:
        found["pos_embed"] = wanted["pos_embed"].detach()
    turn = None if is_own(path) else data_at_one
    if turn and isinstance(model, DiT):
        found = without_variance(found, model)
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise UserError(f"{path} has no `{missing[0]}` ({len(missing)} of {len(wanted)} missing); {_hint(found)}")
    if unknown:
        more = "it has a network beside the backbone: name its run's checkpoint" if "/" in unknown[0] else _hint(found)
        raise UserError(f"{path} has `{unknown[0]}`, which this model lacks ({len(unknown)} such); {more}")
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise UserError(
                f"`{name}` has shape {tuple(found[name].shape)} in {path}, but {tuple(parameter.shape)} in the model; "
                f"{_hint(found)}"
            )
        if found[name].layout != torch.strided or not found[name].is_floating_point():
            raise UserError(f"`{name}` in {path} holds {found[name].dtype}, not plain floating-point numbers")
    return time_turned(found, model, turn) if turn else found


def _hint(found: dict[str, Tensor]) -> str:
    if any(name.startswith(("transformer_blocks.", "down_blocks.")) for name in found):
        return "its names are those of diffusers, and dtrain reads a model's own, as it exports them to safetensors"
    return "compare model.size, model.num_classes, data.channels and diffusion.variance with what was trained"
