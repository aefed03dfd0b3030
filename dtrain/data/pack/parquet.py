"""Parquet files as Hugging Face's `datasets` writes them: a column of images, and one of class numbers.

They can only be read well from their beginning, and packing shuffles: so the pictures are first copied, as they are,
one behind the other into a file beside the shards that are being written.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.data.pack.fitness import Files, field_of
from dtrain.data.pack.left_out import LeftOut, Unfit
from dtrain.data.pack.metadata import class_numbers
from dtrain.data.pack.source import Choice, Source, check_classes, labelled
from dtrain.data.pack.splits import choose, is_split, split_of_file
from dtrain.errors import UserError

_ROWS = 32  # read at a time: pictures may be of many megabytes
_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture", "bytes")
_LABEL_NAMES = ("label", "labels", "cls", "class")


def parquet(path: Path, choice: Choice) -> Source:
    """One file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no Parquet file {path}")
    return parquet_files(path.parent, [path.name], choice)


def parquet_files(folder: Path, names: list[str], choice: Choice) -> Source:
    """Those of one split, in the order of their names, which are relative to the folder. Raises UserError."""
    splits: dict[str | None, list[str]] = {}
    for name in names:
        splits.setdefault(_split_of(name), []).append(name)
    notes: tuple[str, ...] = ()
    if set(splits) != {None}:
        split = choose([s for s in splits if s is not None], choice.split, folder)
        names = splits.pop(split)
        others = sorted(s if s is not None else "files of no split" for s in splits)
        notes = (f"took the split {split}" + (f"; beside it: {', '.join(others)}" if others else ""),)
    elif choice.split is not None:
        raise UserError(f"{folder} has no split {choice.split}; its Parquet files are of none")
    subsets = sorted({_subset_of(name) for name in names})
    if len(subsets) > 1:
        raise UserError(f"{folder} holds several subsets: {', '.join(subsets)}; give the folder of one of them")
    return _tables([folder / name for name in names], choice, notes, folder)


def _split_of(name: str) -> str | None:
    parts = name.split("/")
    return split_of_file(parts[-1]) or next((p for p in reversed(parts[:-1]) if is_split(p)), None)


def _subset_of(name: str) -> str:
    return "/".join(p for p in name.split("/")[:-1] if not is_split(p)) or "."


@dataclass(frozen=True)
class _Columns:
    image: str
    struct: bool  # {bytes, path}, or else the bytes themselves
    label: str | None
    classes: list[str] | None  # as the file names them


def _tables(paths: list[Path], choice: Choice, notes: tuple[str, ...], folder: Path) -> Source:
    columns = [_columns(path, choice) for path in paths]
    for path, one in zip(paths, columns, strict=True):
        if one != columns[0]:
            raise UserError(f"{path} has other columns or classes than {paths[0]}; pack them one by one")
    found = columns[0]
    rows = [_open(path).metadata.num_rows for path in paths]
    first = [0, *accumulate(rows)]
    classes, labels = None, None
    if found.label is not None:
        values = [v for path in paths for v in _column(path, found.label)]
        classes, labels = class_numbers(values, f"the column {found.label} of {paths[0]}")
        if found.classes is not None:
            if len(classes) > len(found.classes):
                raise UserError(f"{paths[0]}: {found.label} holds {len(classes) - 1}, beyond its names of classes")
            classes = found.classes
        check_classes(classes, f"class of {paths[0]}")

    content = hashlib.sha256(json.dumps([found.image, found.label, classes]).encode())
    for path, count in zip(paths, rows, strict=True):
        content.update(os.fsencode(f"{path.relative_to(folder)}\0{path.stat().st_size}\0{count}\n"))

    def unfit(i: int, reason: str) -> LeftOut:
        table = int(np.searchsorted(first, i, side="right")) - 1
        return LeftOut(f"{paths[table].name}, row {i - first[table]}", "rows", reason)

    return Source(
        first[-1],
        classes,
        content.hexdigest(),
        item=lambda i: i,
        files=_row,
        foreign=True,
        unfit=unfit,
        notes=notes,
        spool=partial(_spool, paths, found, labels),
    )


def _columns(path: Path, choice: Choice) -> _Columns:
    """The columns asked for, else those that the file's own description names, else those of the usual name and type.

    Raises UserError where there are several or, for images, none.
    """
    import pyarrow as pa

    schema = _open(path).schema_arrow
    described = _features(schema.metadata)
    types = {name: schema.field(name).type for name in schema.names}
    binary = {name for name, kind in types.items() if pa.types.is_binary(kind) or pa.types.is_large_binary(kind)}
    structs = {n for n, kind in types.items() if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0}
    images = [n for n in types if described.get(n, {}).get("_type") == "Image" and n in structs | binary]
    images = images or sorted(structs) or [n for n in _IMAGE_NAMES if n in binary][:1]
    image = _one(path, "image", images, choice.image_column, [*types])
    if image is None:
        raise UserError(f"{path} has no column of encoded images; its columns are {', '.join(types)}")
    if image not in structs | binary:
        raise UserError(f"{path}: the column {image} is {types[image]}, not encoded images")

    named = [n for n in types if described.get(n, {}).get("_type") == "ClassLabel"]
    plain = [n for n, kind in types.items() if pa.types.is_integer(kind) or pa.types.is_string(kind)]
    labels = named or [n for n in _LABEL_NAMES if n in plain][:1]
    label = _one(path, "label", labels, choice.label_column, [*types])
    if label is not None and label not in (*named, *plain):
        raise UserError(f"{path}: the column {label} is {types[label]}, not class numbers or names")
    names = described.get(label, {}).get("names") if label in named else None
    return _Columns(image, image in structs, label, [str(n) for n in names] if names else None)


def _one(path: Path, what: str, candidates: list[str], asked: str | None, all_columns: list[str]) -> str | None:
    if asked is not None:
        if asked not in all_columns:
            raise UserError(f"{path} has no column {asked}; its columns are {', '.join(all_columns)}")
        return asked
    if len(candidates) > 1:
        names = ", ".join(candidates)
        raise UserError(f"{path} has several {what} columns, {names}; choose one: `--{what}-column {candidates[0]}`")
    return candidates[0] if candidates else None


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict]:
    """What Hugging Face's writer says about the columns; empty for files that others wrote."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: f for name, f in features.items() if isinstance(f, dict)} if isinstance(features, dict) else {}


def _open(path: Path) -> Any:
    """With pages read as they are needed: one row group may hold gigabytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path} is no Parquet file that can be read ({str(e).splitlines()[0]})") from None


def _column(path: Path, name: str) -> list:
    import pyarrow as pa

    try:
        return _open(path).read([name]).column(0).to_pylist()
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path}: the column {name} cannot be read ({str(e).splitlines()[0]}); fetch it anew") from None


def _spool(
    paths: list[Path], columns: _Columns, labels: list[int | None] | None, folder: Path, report: Callable[[int], None]
) -> Callable[[int], Any]:
    """Copy the pictures of all rows into a file in `folder`, unless that was done before a kill.

    Gives the `item` of the source: where a row's picture is in that file, and its label.
    """
    import pyarrow as pa

    pictures, table = folder / "pictures", folder / "pictures.npy"
    if not table.exists() or not pictures.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sizes: list[int] = []
        with open(pictures, "wb") as file:
            for path in paths:
                try:
                    for batch in _open(path).iter_batches(_ROWS, columns=[columns.image]):
                        for value in batch.column(0).to_pylist():
                            data = (value["bytes"] if columns.struct and value else value) or b""
                            file.write(data)
                            sizes.append(len(data))
                        report(len(sizes))
                except pa.ArrowException as e:
                    reason = str(e).splitlines()[0]
                    raise UserError(f"{path}: row {len(sizes)} or after cannot be read ({reason}); fetch it") from None
        ends = np.cumsum(np.array([0, *sizes], dtype=np.int64))
        temporary = table.with_suffix(".tmp.npy")
        np.save(temporary, ends)
        os.replace(temporary, table)  # names it only when it is whole
    ends = np.load(table)

    def item(i: int) -> tuple[str, int, int, bool, int | None]:
        label = None if labels is None else labels[i]
        return str(pictures), int(ends[i]), int(ends[i + 1] - ends[i]), labels is not None, label

    return item


def _row(item: tuple[str, int, int, bool, int | None]) -> Files:
    path, offset, size, has_labels, label = item
    if has_labels and label is None:
        raise Unfit("no label")
    if not size:
        raise Unfit("no picture in the row")
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    return labelled({field_of(data): data}, label)
