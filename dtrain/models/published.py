"""Published DiT weights, by their own names, loaded without running code."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from dtrain.errors import UserError
from dtrain.models.dit import DiT


def load_published(model: DiT, path: str | Path) -> DiT:
    """Copy a published DiT state dict (.pt or .safetensors) into a model of the same architecture; returns it.

    Positions are frozen sines and cosines: for another image size the model keeps its own. Raises UserError for a file
    that is not a plain state dict, or whose names or shapes are not the model's.
    """
    path, wanted = Path(path), dict(model.named_parameters())
    found = _read(path)
    if "pos_embed" in found and found["pos_embed"].shape != wanted["pos_embed"].shape:
        found["pos_embed"] = wanted["pos_embed"].detach()
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise UserError(f"{path} has no `{missing[0]}` ({len(missing)} of {len(wanted)} missing); {_HINT}")
    if unknown:
        raise UserError(f"{path} has `{unknown[0]}`, which this model lacks ({len(unknown)} such); {_HINT}")
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise UserError(
                f"`{name}` has shape {tuple(found[name].shape)} in {path}, but {tuple(parameter.shape)} in the model; "
                f"{_HINT}"
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])
    return model


_HINT = "compare model.size, model.num_classes, data.channels and diffusion.variance with what was trained"


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        elif path.suffix == ".pt":
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise UserError(f"{path} is neither .pt nor .safetensors")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors and could run code; save its state dict alone") from None
    except UserError:
        raise
    except Exception as e:  # a damaged file raises whatever its reader stumbles over
        raise UserError(f"{path} is damaged or no checkpoint: {e}".splitlines()[0]) from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} is not a plain state dict of names and tensors; save its weights alone")
    return dict(found)
