"""What conditions told in words need: that cached words are those of the encoder and of how it is used.

Without torch, for who only asks.
"""

import hashlib
import shlex
from functools import lru_cache
from pathlib import Path

from dtrain.config import Config, Text
from dtrain.config.encoders import check_weights, described
from dtrain.data.shards.embeddings import Embeddings
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import UserError

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}  # of a number in a cache


def check(config: Config, manifest: Manifest) -> None:
    """Raises UserError where a condition reads cached words that are not there, or were made of something else."""
    for name, section in config.texts.items():
        for one in (manifest, *manifest.mixed) if section.cached else ():
            found = next((made for made in one.embeddings if made.name == name), None)
            if found is None:
                raise UserError(
                    f"conditions.{name}.cached: {one.path} has no cached words of this name; make them with: "
                    f"{command(name, section, one.path.parent, 'DEST')}"
                )
            _check_made(name, section, found, one.path)


def _check_made(name: str, section: Text, made: Embeddings, path: Path) -> None:
    for what, theirs, key, ours in (
        ("an encoder of fingerprint", made.encoder, "encoder", fingerprint_of(section)),
        ("captions of", made.field, "field", section.field),
        ("length", made.length, "length", section.length),
        ("width", made.width, "width", section.width),
        ("precision", made.precision, "precision", section.precision),
        ("blocks of", made.block, "block", section.block),
        ("dtype", made.dtype, "cached", section.cached),
    ):
        if theirs != ours and not (what.endswith("fingerprint") and _how(made) != _how(section)):
            shown = [v[:12] if what.endswith("fingerprint") else v for v in (theirs, ours)]
            raise UserError(
                f"{path} was made with {what} {shown[0]}, and conditions.{name}.{key} has {shown[1]}; encode the "
                "captions again"
            )


def _how(one: Embeddings | Text) -> tuple[str, int]:
    """What a fingerprint holds beside files; where that differs, it is what is said."""
    return one.precision, one.block


def command(name: str, section: Text, shards: str | Path, destination: str) -> str:
    """The `dtrain encode` that makes what this condition reads of these shards."""
    words = ["dtrain", "encode", str(shards), destination, "--text", section.encoder, "--length", str(section.length)]
    words += ["--name", name] if name != "text" else []
    words += ["--caption", section.field] if section.field != "txt" else []
    words += ["--dtype", section.cached] if section.cached not in (None, "float16") else []
    words += ["--precision", section.precision] if section.precision != "fp32" else []
    words += ["--block", str(section.block)] if section.block != 1 else []
    return shlex.join(words)


def caption_bytes(section: Text, dtype: str, tokens: float | None = None) -> float:
    """Bytes that a caption of so many tokens, by default the longest that is told, takes in a cache."""
    return (section.length if tokens is None else tokens) * section.width * ITEM_BYTES[dtype]


def fingerprint_of(section: Text) -> str:
    """All that decides what a frozen encoder says: a hash of its folder's files and of how it computes.

    Raises UserError where they cannot be read.
    """
    return fingerprint(section.encoder, section.precision, section.block)


@lru_cache(maxsize=8)
def fingerprint(folder: str, precision: str, block: int) -> str:
    described(folder)  # a folder that is not whole is named as such, and not taken for another encoder
    check_weights(folder)
    digest = hashlib.sha256(f"{precision} {block}".encode())
    places = [Path(folder), Path(folder).parent / "tokenizer"]
    try:
        for path in sorted(path for place in places if place.is_dir() for path in place.iterdir()):
            if path.suffix in (".json", ".safetensors", ".txt", ".model"):
                with open(path, "rb") as file:
                    digest.update(f"\0{path.name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    except OSError as e:
        raise UserError(f"the text encoder in {folder} cannot be read: {e.strerror}") from None
    return digest.hexdigest()
