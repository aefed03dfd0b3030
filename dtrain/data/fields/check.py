"""Which fields of a sample a training reads, and whether a data set has them. Imports no torch and no NumPy."""

from collections.abc import Iterable

from dtrain.config import Config
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.sample_files import DOT_RULE, IMAGE_FIELDS, LABEL_FIELD, dotted
from dtrain.errors import UserError


def wanted_fields(config: Config) -> list[tuple[str, ...]]:
    """What a training reads of each sample: one field of each."""
    labels = [(LABEL_FIELD,)] if config.model.num_classes else []
    return [IMAGE_FIELDS, *labels, *((array.field,) for array in config.data.arrays.values())]


def check_fields(config: Config, manifest: Manifest) -> None:
    """Raises UserError where a data set, or one that is mixed into it, lacks a field that the run reads."""
    for one in (manifest, *manifest.mixed):
        if not set(IMAGE_FIELDS) & set(one.fields):
            fields, hint = ", ".join(one.fields), _hint(one.fields, IMAGE_FIELDS)
            raise UserError(f"{one.path} has fields {fields}, none of them jpg, jpeg, png or webp{hint}")
        if config.model.num_classes and LABEL_FIELD not in one.fields:
            raise UserError(
                f"model.num_classes is {config.model.num_classes}, but {one.path} has no `cls` field with labels; "
                f"set it to 0 to train without{_hint(one.fields, (LABEL_FIELD,))}"
            )
        for name, array in config.data.arrays.items():
            if array.field not in one.fields:
                hint = _hint(one.fields, (array.field,))
                raise UserError(f"data.arrays.{name}: {one.path} has no field {array.field}{hint}")
        check_classes(config, one, f"set it to {len(one.classes or ())}, or to 0 to train without")


def _hint(fields: Iterable[str], wanted: Iterable[str]) -> str:
    other = dotted(fields, wanted)
    return f"; it has `{other}`: {DOT_RULE}" if other else ""


def check_classes(config: Config, manifest: Manifest, advice: str) -> None:
    """Raises UserError, with the advice, where a data set has more classes than the model."""
    ours, theirs = config.model.num_classes, len(manifest.classes or ())
    if 0 < ours < theirs:
        raise UserError(f"model.num_classes is {ours}, but {manifest.path} has {theirs} classes; {advice}")
