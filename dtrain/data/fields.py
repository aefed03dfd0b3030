"""Which fields of a sample a training reads, and whether a data set has them. Imports no torch and no NumPy."""

from dtrain.config import Config
from dtrain.data.manifest import Manifest
from dtrain.errors import UserError

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
LABEL_FIELD = "cls"


def check_fields(config: Config, manifest: Manifest) -> None:
    """Raises UserError where a data set, or one that is mixed into it, lacks a field that the run reads."""
    for one in (manifest, *manifest.mixed):
        if not set(IMAGE_FIELDS) & set(one.fields):
            fields = ", ".join(one.fields)
            raise UserError(f"{one.path} has fields {fields}, none of them jpg, jpeg, png or webp")
        if config.model.num_classes and LABEL_FIELD not in one.fields:
            raise UserError(
                f"model.num_classes is {config.model.num_classes}, but {one.path} has no `cls` field with labels; "
                "set it to 0 to train without"
            )
        for name, array in config.data.arrays.items():
            if array.field not in one.fields:
                raise UserError(f"data.arrays.{name}: {one.path} has no field {array.field}")
        check_classes(config, one, f"set it to {len(one.classes or ())}, or to 0 to train without")


def check_classes(config: Config, manifest: Manifest, advice: str) -> None:
    """Raises UserError, with the advice, where a data set has more classes than the model."""
    ours, theirs = config.model.num_classes, len(manifest.classes or ())
    if 0 < ours < theirs:
        raise UserError(f"model.num_classes is {ours}, but {manifest.path} has {theirs} classes; {advice}")
