"""The weaker model that guidance leads away from: `eval.guide_with` (Karras et al. 2024, autoguidance)."""

from dataclasses import dataclass
from pathlib import Path

import torch

from dtrain.checkpoint.directory import manifest_hash
from dtrain.checkpoint.frozen_base import asked_alike, averaged_where_kept, load_whole
from dtrain.config import Config
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
        checkpoint, theirs = asked_alike(Path(place), config)
        module = load_whole(checkpoint, theirs, averaged_where_kept(checkpoint), device).eval()
        return Guide(module, manifest_hash(checkpoint.path))
    except (UserError, OSError) as e:
        raise UserError(f"eval.guide_with={place} cannot be used: {getattr(e, 'strerror', None) or e}") from None


def check_guide(config: Config) -> None:
    """Raises the UserError that `open_guide` would, as far as configs tell; reads no weights."""
    if (place := config.eval.guide_with) is not None:
        try:
            asked_alike(Path(place), config)
        except UserError as e:
            raise UserError(f"eval.guide_with={place} cannot be used: {e}") from None
