"""The teacher of a distillation: another run's weights, averaged where it has such, frozen beside the players.

It is read from its source at every start. No checkpoint holds it, only its fingerprint: a run goes on with none other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from dtrain import distributed
from dtrain.checkpoint.format import Checkpoint
from dtrain.checkpoint.frozen_base import asked_alike, averaged_where_kept, checkpoint_of, fingerprint, load_whole
from dtrain.conditions.build import build as build_conditions
from dtrain.config import Config
from dtrain.config.guidance import untrained_null
from dtrain.errors import UserError
from dtrain.objectives.objective import Frozen

T = TypeVar("T")


def reader(config: Config) -> Callable[[torch.device], Frozen] | None:
    """What reads the teacher that a config names, on a rank; None where it names none. A collective; raises UserError.

    Rank 0 chooses the checkpoint, since a rank that lists the folder by itself may see another newest one.
    """
    if config.objective.kind != "distillation":
        return None
    path = distributed.on_rank_0(lambda: _told(config, lambda: checkpoint_of(Path(config.objective.teacher)).path))

    def read(device: torch.device) -> Frozen:
        return _told(config, lambda: _read(config, path, device))

    return read


def check_teacher(config: Config) -> None:
    """Raises the UserError that reading it would, as far as configs tell; reads no weights."""
    _told(config, lambda: _checked(config, Path(config.objective.teacher)))


def _read(config: Config, path: Path, device: torch.device) -> Frozen:
    checkpoint, theirs = _checked(config, path)
    module = load_whole(checkpoint, theirs, averaged_where_kept(checkpoint), device).eval().requires_grad_(False)
    return Frozen(module, fingerprint(module))


def _checked(config: Config, place: Path) -> tuple[Checkpoint, Config]:
    checkpoint, theirs = asked_alike(place, config)
    if not theirs.objective.diffuses:
        raise UserError(f"{checkpoint.path} is of an autoencoder; name a run of a {config.diffusion.process} process")
    if config.objective.guidance != 1 and (why := untrained_null(theirs)) is not None:
        raise UserError(f"objective.guidance leads away from its answer with nothing told, but there {why}")
    build_conditions(config).check(checkpoint.meta.get("text_encoders"))
    return checkpoint, theirs


def _told(config: Config, function: Callable[[], T]) -> T:
    """What the function gives. Raises UserError that names the teacher."""
    try:
        return function()
    except (UserError, OSError) as e:
        named = f"objective.teacher={config.objective.teacher}"
        raise UserError(f"{named} cannot be used: {getattr(e, 'strerror', None) or e}") from None
