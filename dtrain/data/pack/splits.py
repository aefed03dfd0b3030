"""Train, validation and test parts of a data set, known by the names of folders or files."""

import re
from collections.abc import Collection

from dtrain.errors import UserError

_TRAIN = {"train", "training"}
_OTHER = {"val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}


def is_split(name: str) -> bool:
    return name.lower() in _TRAIN | _OTHER


def is_training(name: str) -> bool:
    return name.lower() in _TRAIN


def splits_among(folders: Collection[str]) -> list[str]:
    """Those of the folders that are splits, where the folders beside each other are splits and not classes.

    They are where all have a split's name, or one is for training and another is not: `train`, `plane`, `ship` are
    classes; `train`, `test`, `annotations` are not.
    """
    found = sorted(name for name in folders if is_split(name))
    if len(found) == len(folders) or len({is_training(name) for name in found}) == 2:
        return found
    return []


def split_of_file(name: str) -> str | None:
    """`train` of train-00000-of-00002.parquet, train.parquet or train_0.parquet."""
    stem = name.rsplit(".", 1)[0]
    if numbered := re.match(r"(.+?)-\d{5}-of-\d{5}", stem):
        return numbered[1]
    word = re.match(r"[A-Za-z]+", stem)
    return word[0] if word and is_split(word[0]) else None


def choose(splits: Collection[str], asked: str | None, source: object) -> str:
    """The split asked for, or the only one there is. Raises UserError that names them all."""
    names = sorted(splits)
    if asked is None and len(names) == 1:
        return names[0]
    if asked in names:
        return asked
    there = ", ".join(names)
    if asked is None:
        best = next((name for name in names if is_training(name)), names[0])
        raise UserError(f"{source} holds the splits {there}; choose one, such as `--split {best}`")
    raise UserError(f"{source} has no split {asked}; it holds {there}")
