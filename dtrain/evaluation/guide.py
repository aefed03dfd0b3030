"""The weaker model that guidance leads away from: `eval.guide_with` (Karras et al. 2024, autoguidance)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoint.directory import manifest_hash
from dtrain.checkpoint.format import Checkpoint
from dtrain.checkpoint.frozen_base import averaged_where_kept, check_equal, checkpoint_of, load_whole, meaning
from dtrain.config import Config, with_earlier_values
from dtrain.errors import UserError


@dataclass(frozen=True, eq=False)
class Guide:
    """module: in eval mode, its first average where it has such. checkpoint: its hash."""

    module: torch.nn.Module
    checkpoint: str


def open_guide(config: Config, device: torch.device) -> Guide | None:
    """What `eval.guide_with` names, on the device; None where it names nothing. Raises UserError."""
    place = config.eval.guide_with
    if place is None:
        return None
    try:
        checkpoint, theirs = _checked(place, config)
        module = load_whole(checkpoint, theirs, averaged_where_kept(checkpoint), device).eval()
        return Guide(module, manifest_hash(checkpoint.path))
    except (UserError, OSError) as e:
        raise UserError(f"eval.guide_with={place} cannot be used: {getattr(e, 'strerror', None) or e}") from None


def check_guide(config: Config) -> None:
    """Raises the UserError that `open_guide` would, as far as configs tell; reads no weights."""
    if (place := config.eval.guide_with) is not None:
        try:
            _checked(place, config)
        except UserError as e:
            raise UserError(f"eval.guide_with={place} cannot be used: {e}") from None


def _checked(place: str, config: Config) -> tuple[Checkpoint, Config]:
    """(the newest checkpoint of a run, or the one of this folder; its config)."""
    checkpoint = checkpoint_of(Path(place))
    try:
        theirs = Config(**with_earlier_values(checkpoint.meta["config"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{checkpoint.path} does not tell its config; it is no checkpoint of a run") from None
    check_equal(_asked(theirs), _asked(config))
    return checkpoint, theirs


def _asked(config: Config) -> Mapping[str, Any]:
    """Key → value of what two models must share to be asked the same, whatever their sizes."""
    return {**meaning(config), "model.num_classes": config.model.num_classes, "the shape of x_0": list(config.shape)}
