"""The config.json of a folder with published weights, as diffusers and transformers save them."""

from pathlib import Path
from typing import Any

from dtrain.errors import UserError, from_where
from dtrain.files import read_json


def config_json(folder: str | Path, what: str, instead: str) -> Any:
    """What it holds. what, instead: what it describes, and what to do where it is not there. Raises UserError."""
    path = Path(folder) / "config.json"
    try:
        return read_json(path)
    except FileNotFoundError:
        raise UserError(f"there is no {path}{from_where(folder)}, which describes {what}; {instead}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
