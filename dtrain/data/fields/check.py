"""Which fields of a sample a training reads, and whether a data set and each of its samples have them.

Imports no torch and no NumPy.
"""

from collections.abc import Iterable
from pathlib import Path

from dtrain.config import Config
from dtrain.data.declared import Declared, declared
from dtrain.data.fields.caption import Caption
from dtrain.data.fields.captions import look
from dtrain.data.shards.lacking import Lack, lacking, wrong_labels
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.sample_files import DOT_RULE, IMAGE_FIELDS, LABEL_FIELD, dotted
from dtrain.errors import UserError

LOOKED_AT = 1024  # labels
COUNTED = 1_000_000  # samples whose labels are all read where some of those looked at are wrong


def check_fields(config: Config, manifest: Manifest) -> None:
    """Raises UserError where a data set, or one that is mixed into it, lacks a field that the run reads."""
    wanted = declared(config).fields
    for one in (manifest, *manifest.mixed):
        if not set(IMAGE_FIELDS) & set(one.fields) and config.reads_pictures:
            fields, hint = ", ".join(one.fields), _hint(one.fields, IMAGE_FIELDS)
            raise UserError(f"{one.path} has fields {fields}, none of them jpg, jpeg, png or webp{hint}")
        if config.model.num_classes and LABEL_FIELD not in one.fields:
            raise UserError(
                f"model.num_classes is {config.model.num_classes}, but {one.path} has no `cls` field with labels; "
                f"set it to 0 to train without{_hint(one.fields, (LABEL_FIELD,))}"
            )
        for field in wanted:
            if not set(field.extensions) & set(one.fields):
                key = f"data.arrays.{field.name}" if field.name in config.data.arrays else field.name
                hint = _hint(one.fields, field.extensions)
                raise UserError(f"{key}: {one.path} has no field {' or '.join(field.extensions)}{hint}")
        if config.is_coupled and one.pairs is not None and tuple(one.pairs.shape) != config.shape:
            raise UserError(
                f"{one.path} holds pairs of {one.pairs.shape}, and this config's x_0 is {list(config.shape)}; take the "
                "data.image_size and first_stage of the run that drew them"
            )
        check_classes(config.model.num_classes, one, f"set it to {len(one.classes or ())}, or to 0 to train without")


def _hint(fields: Iterable[str], wanted: Iterable[str]) -> str:
    other = dotted(fields, wanted)
    return f"; it has `{other}`: {DOT_RULE}" if other else ""


def check_classes(num_classes: int, manifest: Manifest, advice: str) -> None:
    """Raises UserError, with the advice, where a data set has more classes than the model."""
    if 0 < num_classes < (theirs := len(manifest.classes or ())):
        raise UserError(f"model.num_classes is {num_classes}, but {manifest.path} has {theirs} classes; {advice}")


def lacks_of(
    wanted: Declared, num_classes: int, manifest: Manifest, directory: str | Path, everything: bool = False
) -> list[Lack]:
    """What a training that reads `wanted` would miss in a data set. everything: read all labels, not some."""
    found = lacking(manifest, directory, wanted.extensions)
    captions = [look(manifest, directory, field, LOOKED_AT) for field in wanted.fields if isinstance(field, Caption)]
    found += [one.wrong for one in captions if one.wrong is not None]
    most = None if everything else LOOKED_AT
    labels = wrong_labels(manifest, directory, num_classes, most) if num_classes else None
    if labels and labels.of < manifest.samples <= COUNTED:
        labels = wrong_labels(manifest, directory, num_classes)
    return found + ([labels] if labels else [])


def check_training(config: Config, manifest: Manifest, everything: bool = False) -> list[str]:
    """Lines about samples that data.on_error "replace" will pass over.

    Raises UserError where one ends a run, or where they are more than data.max_bad_fraction allows.
    """
    data, wanted, lines = config.data, declared(config), []
    for one, source in zip((manifest, *manifest.mixed), (data, *data.mix), strict=True):
        for lack in lacks_of(wanted, config.model.num_classes, one, source.shards, everything):
            if data.on_error != "replace":
                raise UserError(f"{one.path}: {lack}; pack the shards without such, or take data.on_error replace")
            if lack.count > data.max_bad_fraction * lack.of:
                raise UserError(
                    f"{one.path}: {lack}; that is more than data.max_bad_fraction {data.max_bad_fraction} allows, so "
                    "pack the shards without such"
                )
            lines.append(f"{lack}; others take their place, by data.on_error")
    return lines


def check_split(manifest: Manifest) -> None:
    """Raises UserError where a held-out split, of which every sample is used, has one without a picture or label."""
    wanted = [IMAGE_FIELDS, (LABEL_FIELD,)]
    lacks = lacking(manifest, manifest.place, wanted)
    if labels := wrong_labels(manifest, manifest.place, 0, LOOKED_AT):
        lacks.append(labels)
    for lack in lacks:
        raise UserError(f"{manifest.path}: {lack}; every held-out sample is used, so pack the split without such")
