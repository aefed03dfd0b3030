"""Words to tokens: UTF-8 bytes, or the tokenizer in a text encoder's folder."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from dtrain.config.conditions import BEGIN
from dtrain.errors import UserError


class Tokenizer(Protocol):
    """Words to token numbers, with those that begin and end a text.

    closing: how many end it, which a text that is cut keeps.
    """

    closing: int

    def __call__(self, words: str) -> list[int]: ...


class Bytes:
    closing = 0

    def __call__(self, words: str) -> list[int]:
        return [BEGIN, *words.encode()]


class OfFolder:
    """The tokenizer that transformers finds in a local folder; read where it is first asked. Raises UserError there."""

    def __init__(self, folder: str):
        self._folder = folder

    @property
    def closing(self) -> int:
        return _closing(self._folder)

    def __call__(self, words: str) -> list[int]:
        return _read(self._folder)(words, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]


@lru_cache(maxsize=8)
def _closing(folder: str) -> int:
    tokens = OfFolder(folder)
    empty, some = tokens(""), tokens("a")
    begins = next((i for i, pair in enumerate(zip(empty, some, strict=False)) if pair[0] != pair[1]), len(empty))
    return len(empty) - begins


@lru_cache(maxsize=8)
def _read(folder: str) -> Any:
    """One a process: what is kept here never travels to a worker."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not outlive a fork, of which it warns
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise UserError(missing(folder, e)) from None
    path = Path(folder)
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")):
        beside = path.parent / "tokenizer"
        if not beside.is_dir():
            raise UserError(f"{folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json there")
        path = beside  # as in a pipeline of diffusers
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"the tokenizer in {path} cannot be read ({reason}); copy the folder again") from None


def missing(folder: str, error: ImportError) -> str:
    """What to say where transformers, which dtrain does without, is not there or cannot be used."""
    why = "is not installed" if getattr(error, "name", None) == "transformers" else f"cannot be used ({error})"
    return (
        f"the text encoder {folder} needs the package transformers, which {why}: pip install 'dtrain[text]', or take "
        "encoder bytes"
    )
