"""The base of a training: another run's averaged weights, or a file's, frozen beside the players.

Pictures control it through a trained copy, or low-rank adapters are trained for it.

It is read from its source at every start. No checkpoint holds it, only its fingerprint: a run goes on with none other.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtrain.checkpoint.averages import Combination
from dtrain.checkpoint.directory import complete
from dtrain.checkpoint.export import load_weights
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.checkpoint.parameters import check_same
from dtrain.config import Config, architecture, with_earlier_values
from dtrain.errors import UserError, from_where
from dtrain.models.build import allocate
from dtrain.models.published import load_published, published
from dtrain.models.weight_file import holds_average
from dtrain.run import RunDirectory

NAME = "base"  # among the networks that no checkpoint holds
EXPORTED = "model.safetensors"  # of a folder of `dtrain checkpoints export`
# Keys of `diffusion` that say how a network is trained, not what its answer means.
_OF_TRAINING = (
    "label_dropout",
    "stratified",
    "logit_normal",
    "loss",
    "weighting",
    "min_snr_gamma",
    "times",
    "least_time",
    "coupling",
    "perceptual",
    "schedule_lr_factor",
)

_OPENED: "dict[tuple[str, str, str], Base]" = {}  # by source, config and device


@dataclass(frozen=True, eq=False)
class Base:
    """module: frozen, in eval mode. fingerprint: of its weights as they were read."""

    module: nn.Module
    fingerprint: str
    source: str

    def check(self) -> None:
        """Raises UserError where the weights are no longer those that were read."""
        if (now := fingerprint(self.module)) != self.fingerprint:
            raise UserError(
                f"the frozen weights of {self.source} have changed in memory while they were trained with: fingerprint "
                f"{now[:12]}, and {self.fingerprint[:12]} at the start; this run's control is of no known base"
            )

    def check_of_checkpoint(self, held: Any) -> None:
        """Raises UserError where a checkpoint, as its `held` says, was trained with another base."""
        theirs = held.get(NAME) if isinstance(held, dict) else None
        if theirs != self.fingerprint:
            raise UserError(
                f"it was trained with another base (fingerprint {str(theirs)[:12]} there, {self.fingerprint[:12]} "
                f"here); name that run, checkpoint or file, instead of {self.source}, in the config"
            )


def open_base(config: Config, device: torch.device) -> Base | None:
    """What `model.control_of` or `model.adapt` names, on the device; None where neither is there. Once a process.

    Raises UserError where it cannot be read, or is of another model or process than this config's.
    """
    source, of = config.base_source, config.base
    if source is None:
        return None
    key = source, of.dump(), str(device)
    if key not in _OPENED:
        module = read_base(source, of).to(device)
        _OPENED.clear()  # one at a time: it may be large
        _OPENED[key] = Base(module, fingerprint(module), source)
    return _OPENED[key]


def allocate_whole(config: Config, device: torch.device) -> nn.Module:
    """The backbone of a config on a device, its weights not yet written, upon its base where it has one."""
    backbone, base = allocate(config).to(device), open_base(config, device)
    return backbone if base is None else backbone.stand_on(base.module)


def load_whole(checkpoint: Checkpoint | Combination, config: Config, key: str, device: torch.device) -> nn.Module:
    """A checkpoint's weights `key`, as `load_weights`, upon the base that they were trained with. Raises UserError."""
    if (base := open_base(config, device)) is not None:
        try:
            base.check_of_checkpoint(checkpoint.meta.get("held"))
        except UserError as e:
            raise UserError(f"{checkpoint.path} cannot be used: {e}") from None
    return load_weights(checkpoint, allocate_whole(config, device), key)


@torch.no_grad()
def load_merged(checkpoint: Checkpoint | Combination, config: Config, key: str) -> nn.Module:
    """A plain model that computes what a checkpoint's adapters do on their base. Raises UserError."""
    merged, plain = load_whole(checkpoint, config, key, torch.device("cpu")).merged(), allocate(config.base)
    for name, p in plain.named_parameters():
        p.copy_(merged[name])
    return plain


def fingerprint(module: nn.Module) -> str:
    """sha256 of every parameter's name, shape and float32 values."""
    digest = hashlib.sha256()
    for name, p in sorted(module.named_parameters()):
        digest.update(f"{name} {list(p.shape)}\0".encode())
        digest.update(p.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_base(source: str, config: Config) -> nn.Module:
    """The model of the config with the source's weights: averaged where it has such. Raises UserError."""
    model = allocate(config)
    try:
        if (file := _file(Path(source))) is not None:
            return load_published(model, file, "ema" if holds_average(file) else None, config.diffusion.data_at_one)
        checkpoint = checkpoint_of(Path(source))
        _check_same(checkpoint.meta.get("config"), config)
        return load_weights(checkpoint, model, averaged_where_kept(checkpoint))
    except UserError as e:
        raise UserError(f"the base {source} cannot be used: {e}") from None


def check_source(source: str, config: Config) -> None:
    """Raises the UserError that `read_base` would, as far as configs, names and shapes tell; reads no weights."""
    with torch.device("meta"):
        model = allocate(config)
    try:
        if (file := _file(Path(source))) is not None:
            published(model, file, "ema" if holds_average(file) else None, config.diffusion.data_at_one)
        else:
            checkpoint = checkpoint_of(Path(source))
            _check_same(checkpoint.meta.get("config"), config)
            check_same(checkpoint, {name: p.numel() for name, p in model.named_parameters()})
    except UserError as e:
        raise UserError(f"the base {source} cannot be used: {e}") from None


def _file(path: Path) -> Path | None:
    """A file of weights, or the one in an exported folder."""
    return next((one for one in (path, path / EXPORTED) if one.is_file()), None)


def checkpoint_of(path: Path) -> Checkpoint:
    """A checkpoint's own folder, or the newest of a run. Raises UserError."""
    if not (path / "manifest.json").is_file():
        if not path.exists() and not (Path("runs") / path).exists():
            raise UserError(f"there is no such run, checkpoint or file{from_where(str(path))}")
        found = complete(RunDirectory.find(path).checkpoints)
        if not found:
            raise UserError("the run has no complete checkpoint yet")
        path = found[-1]
    try:
        return Checkpoint.open(path)
    except Damaged as e:
        raise UserError(f"the checkpoint is damaged: {e}") from None


def asked_alike(place: Path, config: Config) -> tuple[Checkpoint, Config]:
    """(the newest checkpoint of a run, or the one of this folder; its config) of a model that is asked as this config's
    is, whatever its size. Raises UserError.
    """
    checkpoint = checkpoint_of(place)
    try:
        theirs = Config(**with_earlier_values(checkpoint.meta["config"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{checkpoint.path} does not tell its config; it is no checkpoint of a run") from None
    check_equal(_asked(theirs), _asked(config))
    return checkpoint, theirs


def _asked(config: Config) -> Mapping[str, Any]:
    """Key → value of what two models must share to be asked the same."""
    return {**meaning(config), "model.num_classes": config.model.num_classes, "the shape of x_0": list(config.shape)}


def averaged_where_kept(checkpoint: Checkpoint) -> str:
    """The key of its first average, or of the raw weights where it has none."""
    return "ema_0" if any(name.endswith(":ema_0") for name in checkpoint.tensors) else "fp32"


def _check_same(theirs: Any, ours: Config) -> None:
    """Raises UserError where a checkpoint's config is of another model or process than the one that is to be its."""
    try:
        theirs = Config(**with_earlier_values(theirs))
    except (AttributeError, TypeError, ValueError):
        return  # a program of the user's wrote it: names and shapes alone tell
    check_equal(meaning(theirs), meaning(ours))
    check_equal(architecture(theirs), architecture(ours))


def check_equal(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises UserError with the first key that has two values; the process says more than its own keys."""
    for key in sorted(there.keys() | here.keys(), key=lambda name: (name != "diffusion.process", name)):
        if there.get(key) != here.get(key):
            raise UserError(f"{key} is {there.get(key)} there, {here.get(key)} here")


def meaning(config: Config) -> Mapping[str, Any]:
    """Key → value of what decides what a network's answer means."""
    tree = config.diffusion.model_dump(mode="json")
    own = {f"diffusion.{key}": value for key, value in tree.items() if not key.startswith(_OF_TRAINING)}
    return own | {"first_stage.kind": config.first_stage.kind, "conditions": sorted(config.conditions)}
