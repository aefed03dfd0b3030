"""A folder with a text encoder of transformers, as its config.json describes it. Imports no torch, reads no weights."""

from pathlib import Path
from typing import NamedTuple

from dtrain.config.folders import config_json
from dtrain.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files
# model_type in config.json → (which of its sections describes the text model, how a token's width is called there)
KINDS = {
    "clip": ("text_config", "hidden_size"),
    "clip_text_model": (None, "hidden_size"),
    "t5": (None, "d_model"),
    "umt5": (None, "d_model"),
    "bert": (None, "hidden_size"),
    "roberta": (None, "hidden_size"),
    "xlm-roberta": (None, "hidden_size"),
    "mpnet": (None, "hidden_size"),
    "distilbert": (None, "dim"),
}


class TextEncoder(NamedTuple):
    """kind: `model_type`. width: channels of a token."""

    kind: str
    width: int


def described(folder: str | Path) -> TextEncoder:
    """Raises UserError where the folder has no text encoder that can be used."""
    path = Path(folder) / "config.json"
    inner = Path(folder) / "text_encoder"
    instead = f"take {inner}" if (inner / "config.json").is_file() else "copy a folder that transformers has saved"
    tree = config_json(folder, "a text encoder", instead)
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if kind not in KINDS:
        raise UserError(f"{path} describes {kind or 'no model of transformers'}; take a folder of {', '.join(KINDS)}")
    section, key = KINDS[kind]
    own = tree.get(section, {}) if section else tree
    width = own.get(key) if isinstance(own, dict) else None
    if not isinstance(width, int) or width < 1:
        raise UserError(f"{path} does not say its {key}; copy the folder again")
    return TextEncoder(kind, width)


def check(key: str, width: int, folder: str | Path) -> None:
    """Raises UserError where the folder has no weights, or tokens of another width than `width`, the value of `key`."""
    if (theirs := described(folder).width) != width:
        raise UserError(f"{key} is {width}, and {folder} has {theirs}; name another encoder")
    check_weights(folder)


def check_weights(folder: str | Path) -> None:
    """Raises UserError where the folder has no weights."""
    if not any((Path(folder) / name).is_file() for name in (WEIGHTS, INDEX)):
        raise UserError(f"{folder} has no {WEIGHTS}; copy it there, or save it anew with `save_pretrained`")
