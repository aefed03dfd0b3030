"""What the files of a sample are called in a shard. Imports no torch and no NumPy."""

from collections.abc import Iterable

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
LABEL_FIELD = "cls"
CAPTION_FIELD = "txt"
MOMENTS_FIELD = "moments.npy"  # of a latent cache
DRAWN_FIELD, NOISE_KEY_FIELD = "x0.npy", "noise.npy"  # of pairs: what was drawn, and the key of its noise
EMBEDDINGS_ENDING = "safetensors"  # of cached words
DOT_RULE = "all that follows the first dot of a file's name is its extension, so rename files with dots in their names"


def class_number(label: bytes) -> int | None:
    """What a label's file holds; None for what is none."""
    return int(label) if label.strip().isdigit() and len(label) <= 18 else None


def embeddings_field(condition: str) -> str:
    """What the condition of this name reads of a cache of its words."""
    return f"{condition}.{EMBEDDINGS_ENDING}"


def dotted(fields: Iterable[str], wanted: Iterable[str]) -> str | None:
    """A field such as `0.jpg`, of `photo v2.0.jpg`, which ends in a wanted one: its name has a dot before that."""
    ends = tuple(f".{field}" for field in wanted)
    return next((field for field in fields if field.endswith(ends)), None)
