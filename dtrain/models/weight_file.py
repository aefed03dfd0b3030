"""A file of weights as a state dict: what torch.save and safetensors wrote, by whatever training, without running code.

Memory is bounded by the file: an archive's tensors stay on disk until they are used, and nothing is decompressed.
"""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dtrain.errors import UserError

Which = Literal["ema", "model"]

# Where trainings keep a set of weights in a file that holds more.
_SETS: dict[Which, tuple[str, ...]] = {
    "ema": ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "params_ema"),
    "model": ("model", "state_dict", "model_state_dict", "module", "net", "params"),
}
_WRAPPERS = ("module.", "model.")  # before every name: of DistributedDataParallel, of Lightning
_COMPILED = "_orig_mod."  # of torch.compile, also within a name
_COUNTER = "n_averaged"  # of torch's AveragedModel, beside the weights
WRITTEN_BY, PROGRAM = "written_by", "dtrain"  # in the metadata of a file that `dtrain checkpoints export` wrote
_PICKLE = 1 << 26  # bytes of the part of an archive that names its tensors
_SHOWN = 4


def read_weights(path: str | Path, which: Which | None = None) -> dict[str, Tensor]:
    """Name → tensor of a .safetensors file, or of any other as torch.save's, without the prefixes of wrappers.

    which: of a file that holds several sets; None where it holds one. Raises UserError that says what to do.
    """
    path = Path(path)
    found = _read(path)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{path} is not a plain state dict of names and tensors; save its weights alone")
    chosen = _chosen(path, found, which)
    if not chosen or not all(isinstance(value, Tensor) for value in chosen.values()):
        raise UserError(
            f"{path} is not a plain state dict of names and tensors, and has none under a name such as `model`: it "
            f"holds {_listed(found)}; save its weights alone"
        )
    return _unwrapped(path, chosen)


def holds_average(path: str | Path) -> bool:
    """Whether a file has averaged weights under a name of their own. Raises as `read_weights`."""
    if is_own(path):
        return False
    found = _read(Path(path))
    return isinstance(found, dict) and all(isinstance(name, str) for name in found) and "ema" in _sets(found)


def is_own(path: str | Path) -> bool:
    """Whether `dtrain checkpoints export` wrote a file of weights. Raises UserError for one that is damaged."""
    if Path(path).suffix != ".safetensors":
        return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(WRITTEN_BY) == PROGRAM
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is damaged or no checkpoint: {e}".splitlines()[0]) from None


def _chosen(path: Path, found: dict[str, Any], which: Which | None) -> dict[str, Any]:
    """One of several sets, or all that was found where it is one."""
    sets = _sets(found)
    if not sets:
        if which == "ema":
            raise UserError(f"{path} holds one set of weights, not called an average; leave run.init_weights out")
        return found
    if which is None and len(sets) > 1:
        ema, model = (f"`{sets[kind][0]}`" for kind in _SETS)
        raise UserError(
            f"{path} holds averaged weights, {ema}, and raw ones, {model}; choose: run.init_weights=ema or "
            "run.init_weights=model"
        )
    if which is not None and which not in sets:
        (other,) = sets
        raise UserError(f"{path} has no weights of the kind {which}, only {other}; leave run.init_weights out")
    return sets[which or next(iter(sets))][1]


def _sets(found: dict[str, Any]) -> dict[Which, tuple[str, dict[str, Any]]]:
    """Kind → (its name in the file, the weights): nested, or in one dict by the beginnings of the names."""
    nested = {name: value for name, value in found.items() if isinstance(value, dict) and _of_tensors(value)}
    if not nested:
        heads = {name.partition(".")[0] for name in found}
        known = {name for names in _SETS.values() for name in names}
        if heads <= known:
            nested = {
                head: {n.removeprefix(f"{head}."): v for n, v in found.items() if n.startswith(f"{head}.")}
                for head in heads
            }
    named = {kind: next((name for name in names if name in nested), None) for kind, names in _SETS.items()}
    return {kind: (name, nested[name]) for kind, name in named.items() if name is not None}


def _of_tensors(value: dict) -> bool:
    return bool(value) and all(isinstance(name, str) and isinstance(v, Tensor) for name, v in value.items())


def _unwrapped(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    count = len(state)
    state = {name.replace(_COMPILED, ""): value for name, value in state.items()}
    if len(state) < count:
        raise UserError(f"{path} holds weights twice, with and without `{_COMPILED}`; save one of them alone")
    if any(name.startswith(_WRAPPERS) for name in state):
        state.pop(_COUNTER, None)
    while wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in state)), None):
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        archive = zipfile.is_zipfile(path)
        if archive:
            _check_archive(path)
        # What the published training script keeps its options in; it holds names and values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except pickle.UnpicklingError as e:
        kind = re.search(r"GLOBAL ([\w.]+)", str(e))
        of = f" (`{kind[1]}`)" if kind else ""
        raise UserError(
            f"{path} holds more than tensors{of} and could run code; where you trust it, save its state dict alone"
        ) from None
    except UserError:
        raise
    except Exception as e:  # a damaged file raises whatever its reader stumbles over
        raise UserError(f"{path} is damaged or no checkpoint: {e}".splitlines()[0]) from None


def _check_archive(path: Path) -> None:
    """Raises UserError for an archive that torch.save does not write."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.filename.endswith("constants.pkl") for part in parts):
        raise UserError(f"{path} is a TorchScript program, not weights; save its state dict with torch.save")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise UserError(f"{path} is a compressed archive, which torch.save does not write; unpack it")
    if any(part.filename.endswith(".pkl") and part.file_size > _PICKLE for part in parts):
        raise UserError(f"{path} holds far more than names and tensors; save its weights alone")


def _listed(found: dict) -> str:
    more = f" and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
    return ", ".join(f"`{name}`" for name in list(found)[:_SHOWN]) + more if found else "nothing"
