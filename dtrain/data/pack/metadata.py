"""Labels from a metadata.jsonl or metadata.csv beside pictures, as Hugging Face's `imagefolder` writes them."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.data.pack.left_out import LeftOut
from dtrain.errors import UserError

NAMES = ("metadata.jsonl", "metadata.csv")
COLUMN, LABEL = "file_name", "label"
MOST_CLASSES = 1_000_000


@dataclass
class Labels:
    """rows: class number by a picture's name relative to its folder, None for a row without one."""

    classes: list[str]
    rows: dict[str, int | None]
    left_out: list[LeftOut] = field(default_factory=list)


def find(base: Path, split: str | None) -> Path | None:
    """The folder's own table, or for a split's folder that of the folder around it."""
    folders = [base] if split is None else [base, base.parent]
    return next((f / name for f in folders for name in NAMES if (f / name).is_file()), None)


def labels_of(table: Path, base: Path, split: str | None, column: str | None) -> Labels | str | None:
    """The table's labels from `column`, by default `label`; a line to show where it has rows and no such column.

    None where it is no table of files. Raises UserError where it is damaged, or has no column that was asked for.
    """
    rows = _jsonl(table) if table.suffix == ".jsonl" else _csv(table)
    found: dict[str, object] = {}
    columns: dict[str, None] = {}
    left_out = []
    wanted = column or LABEL
    inside = "" if table.parent == base else f"{split}/"
    for line, row in rows:
        if COLUMN not in row:
            if column is not None:
                raise UserError(f"{table}, line {line}: there is no {COLUMN}; name each picture there")
            return None
        columns |= dict.fromkeys(row)
        name = os.path.normpath(str(row[COLUMN]))
        if name.startswith(("/", "../")):
            left_out.append(LeftOut.file(name, f"outside the folder of {table.name}"))
        elif name.startswith(inside):
            name = name.removeprefix(inside)
            if name in found:
                left_out.append(LeftOut.file(name, f"a further row of {table.name}"))
            else:
                found[name] = row.get(wanted)
    if wanted not in columns:
        others = ", ".join(c for c in columns if c != COLUMN) or "none"
        if column is not None:
            raise UserError(f"{table} has no column {column}; besides {COLUMN} it has {others}")
        return f"{table.name} has no column {LABEL}; `--label-column` takes another one of it: {others}"
    classes, numbers = class_numbers(list(found.values()), table, csv_text=table.suffix == ".csv")
    return Labels(classes, dict(zip(found, numbers, strict=True)), left_out)


def captions_of(table: Path, base: Path, split: str | None, column: str) -> dict[str, str]:
    """The caption of each picture in the table, by its name relative to its folder; "" of a row without one.

    Raises UserError where it is damaged, or has no such column.
    """
    found: dict[str, str] = {}
    inside = "" if table.parent == base else f"{split}/"
    for line, row in _jsonl(table) if table.suffix == ".jsonl" else _csv(table):
        if COLUMN not in row:
            raise UserError(f"{table}, line {line}: there is no {COLUMN}; name each picture there")
        if column not in row and table.suffix == ".csv":
            others = ", ".join(c for c in row if c != COLUMN) or "none"
            raise UserError(f"{table} has no column {column}; besides {COLUMN} it has {others}")
        words = row.get(column)
        if words is not None and not isinstance(words, str):
            raise UserError(f"{table}, line {line}: {column} is {words!r}, no text; correct it")
        name = os.path.normpath(str(row[COLUMN]))
        if name.startswith(inside):
            found.setdefault(name.removeprefix(inside), words or "")
    return found


def class_numbers(values: list, where: object, csv_text: bool = False) -> tuple[list[str], list[int | None]]:
    """Class names and the number of each value, None for one that is missing or negative.

    Numbers stay as they are and are named by themselves; texts are numbered in their order. Raises UserError for a
    mixture of both, and for anything else.
    """
    given = [v for v in values if v is not None and v != ""]
    if csv_text and all(v.lstrip("-").isdecimal() for v in given):
        values = [None if v in (None, "") else int(v) for v in values]
        given = [v for v in values if v is not None]
    if all(isinstance(v, int) and not isinstance(v, bool) for v in given):
        numbers = [None if v is None or v == "" or v < 0 else int(v) for v in values]
        most = max((n for n in numbers if n is not None), default=-1)
        if most >= MOST_CLASSES:
            raise UserError(f"{where} has the label {most}; class numbers go from 0 to {MOST_CLASSES - 1:,}")
        return [str(n) for n in range(most + 1)], numbers
    if other := next((v for v in given if not isinstance(v, str)), None):
        kind = "a mixture of texts and numbers" if isinstance(other, int) else f"the label {str(other)[:40]!r}"
        raise UserError(f"{where} has {kind}; labels are all class numbers, or all names of classes")
    classes = sorted(set(given))
    number = {name: n for n, name in enumerate(classes)}
    return classes, [number.get(v) for v in values]


def _jsonl(table: Path) -> Iterator[tuple[int, dict]]:
    try:
        with open(table, encoding="utf-8") as lines:
            for n, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{table}, line {n}: this is no JSON object; write one a picture")
                    yield n, row
    except (OSError, ValueError, RecursionError) as e:
        raise e if isinstance(e, UserError) else UserError(f"{table} cannot be read ({e}); correct it") from None


def _csv(table: Path) -> Iterator[tuple[int, dict]]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                yield reader.line_num, {k: v for k, v in row.items() if k is not None}
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f"{table} cannot be read ({e}); correct it") from None
