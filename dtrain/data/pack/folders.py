"""Folders of pictures as what can be packed: flat, of class folders, of splits, or with a table of labels."""

import difflib
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.data.pack.fitness import Files, field_of
from dtrain.data.pack.left_out import LeftOut, summary
from dtrain.data.pack.metadata import Labels, captions_of, find, labels_of
from dtrain.data.pack.source import FORMS, Choice, Source, captioned, check_classes, labelled
from dtrain.data.pack.splits import choose, is_training, splits_among
from dtrain.data.pack.walk import SUFFIXES, Walk, files_below, folders_in, walk
from dtrain.errors import UserError
from dtrain.files import read_bytes

LONGEST_CAPTION = 1 << 20  # bytes


def folder(path: Path, choice: Choice) -> Source:
    """The pictures below a folder, or its Parquet files. Raises UserError where it has neither."""
    if not path.is_dir():
        wrong = f"{path} cannot be packed" if path.exists() else f"there is no folder {path} to pack{_near(path)}"
        raise UserError(f"{wrong}; SOURCE is {FORMS}")
    if tables := [name for name in files_below(path, ".parquet", 2) if Path(name).name != "metadata.parquet"]:
        from dtrain.data.pack.parquet import parquet_files

        choice.only(str(path), "split", "label_column", "image_column")
        return parquet_files(path, tables, choice)

    choice.only(str(path), "split", "label_column", "captions", "caption_column")
    folders = folders_in(path)
    splits = splits_among(folders)
    if choice.split is not None and choice.split in folders and choice.split not in splits:
        splits = [choice.split]  # whoever names a folder knows what it is
    if not splits:
        if choice.split is not None:
            raise UserError(f"{path} has no split {choice.split}; it holds {_shown(folders) or 'no folders'}")
        return _pictures(path, None, choice)
    split = choose(splits, choice.split, path)
    source = _pictures(path / split, split, choice, _training_classes(path, splits, split))
    beside = [name for name in folders if name != split]
    note = f"took the split {split}" + (f"; beside it: {_shown(beside)}" if beside else "")
    return replace(source, notes=(note, *source.notes))


def _near(path: Path) -> str:
    """A question whether the user meant a folder of nearly the same name; nothing where there is none."""
    names = folders_in(path.parent) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


@dataclass(frozen=True)
class _Found:
    """The pictures to pack, each with its label or None."""

    pictures: list[tuple[str, int]]
    labels: list[int] | None
    classes: list[str] | None
    left_out: list[LeftOut]
    notes: tuple[str, ...] = ()


def _pictures(base: Path, split: str | None, choice: Choice, training: list[str] | None = None) -> Source:
    found = walk(base)
    if not found.pictures:
        raise UserError(_nothing(base, found))
    table = find(base, split)
    labels = labels_of(table, base, split, choice.label_column) if table else None
    if choice.label_column is not None and table is None:
        raise UserError(f"there is no metadata.jsonl or metadata.csv in {base} that --label-column could be of")
    taken = _by_table(found, labels, table) if isinstance(labels, Labels) else _by_folders(base, found, training)
    notes = (*taken.notes, labels) if isinstance(labels, str) and not choice.caption_column else taken.notes
    captions = _captions(base, split, choice, table, [name for name, _ in taken.pictures])
    left_out = taken.left_out
    if captions is not None:
        there = sum(one is not None for one in captions)
        notes = (*notes, f"captions: {there:,}" + (f"; {n:,} without, empty" if (n := len(captions) - there) else ""))
        if choice.captions:
            beside = {_beside(name) for name, _ in taken.pictures}
            left_out = [one for one in left_out if one.name not in beside]

    content = hashlib.sha256()
    for n, (name, size) in enumerate(taken.pictures):
        own = f"\0{taken.labels[n]}" if isinstance(labels, Labels) else ""
        own += f"\0{captions[n]}" if captions is not None else ""
        content.update(os.fsencode(f"{name}\0{size}{own}\n"))

    def item(i: int) -> tuple[str, int | None, str | None]:
        label = taken.labels[i] if taken.labels is not None else None
        return os.path.join(base, taken.pictures[i][0]), label, None if captions is None else captions[i] or ""

    return Source(
        len(taken.pictures),
        taken.classes,
        content.hexdigest(),
        item,
        _file,
        foreign=True,
        unfit=lambda i, reason: LeftOut.file(taken.pictures[i][0], reason),
        left_out=tuple(left_out),
        notes=notes,
    )


def _captions(
    base: Path, split: str | None, choice: Choice, table: Path | None, names: list[str]
) -> list[str | None] | None:
    """The caption of each of these pictures, None for one without; None where none are asked for. Raises UserError."""
    if choice.captions and choice.caption_column is not None:
        raise UserError("--captions are of .txt files and --caption-column is of a table; give one of them")
    if choice.caption_column is not None:
        if table is None:
            raise UserError(f"there is no metadata.jsonl or metadata.csv in {base} that --caption-column could be of")
        rows = captions_of(table, base, split, choice.caption_column)
        return [rows.get(name) for name in names]
    if not choice.captions:
        return None
    found = [_read_caption(base / _beside(name)) for name in names]
    if not any(one is not None for one in found):
        raise UserError(f"no picture in {base} has a .txt of its name beside it; leave --captions away")
    return found


def _beside(name: str) -> str:
    """What the file with a picture's caption is called."""
    return os.path.splitext(name)[0] + ".txt"


def _read_caption(path: Path) -> str | None:
    try:
        return read_bytes(path, LONGEST_CAPTION).decode("utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 at byte {e.start}; correct it") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; restore it, or take it out of the folder") from None


def _by_folders(base: Path, found: Walk, training: list[str] | None) -> _Found:
    """Each sub-folder is a class, numbered in the order of the names; without sub-folders there are no labels.

    training: the classes of the training split, whose numbers another split takes over.
    """
    inside = [p for p in found.pictures if "/" in p[0]]
    if not inside:
        return _Found(found.pictures, None, None, found.left_out)
    classes = folders_in(base)
    loose = [LeftOut.file(name, "beside the class folders") for name, _ in found.pictures if "/" not in name]
    if len(loose) > len(inside):  # more likely one folder of pictures with something put aside
        raise UserError(
            f"{base} holds {len(loose):,} pictures beside folders with {len(inside):,} ({_shown(classes)}); move the "
            "folders away for pictures without classes, or all pictures into folders, one a class"
        )
    check_classes(classes, "class folder")
    names = [name.split("/", 1)[0] for name, _ in inside]
    if empty := set(classes) - set(names):
        first = min(empty)
        if os.path.realpath(base / first) in {os.path.realpath(base / name) for name in classes if name != first}:
            raise UserError(f"the class folder {base / first} is linked to another class folder; remove one of them")
        raise UserError(f"the class folder {base / first} has no .jpg, .jpeg, .png or .webp files; fill or remove it")
    if training and set(classes) <= set(training):
        classes = training
    number = {name: n for n, name in enumerate(classes)}
    return _Found(inside, [number[name] for name in names], classes, [*found.left_out, *loose])


def _by_table(found: Walk, labels: Labels, table: Path) -> _Found:
    pictures, numbers, left_out = [], [], [*found.left_out, *labels.left_out]
    left_out = [one for one in left_out if one.name != table.name]
    for name, size in found.pictures:
        if name not in labels.rows:
            left_out.append(LeftOut.file(name, f"no row in {table.name}"))
        elif labels.rows[name] is None:
            left_out.append(LeftOut.file(name, f"no label in {table.name}"))
        else:
            pictures.append((name, size))
            numbers.append(labels.rows[name])
    there = {name for name, _ in found.pictures}
    left_out += [
        LeftOut.file(name, f"a row of {table.name} without a file") for name in labels.rows if name not in there
    ]
    if not pictures:
        raise UserError(f"{table} labels none of the {len(there):,} pictures; {'; '.join(summary(left_out))}")
    check_classes(labels.classes, f"class of {table}")
    return _Found(pictures, numbers, labels.classes, left_out)


def _training_classes(path: Path, splits: list[str], split: str) -> list[str] | None:
    training = [name for name in splits if is_training(name) and name != split]
    return folders_in(path / training[0]) if training else None


def _nothing(base: Path, found: Walk) -> str:
    kinds = [one.kind for one in found.left_out]
    if ".tar" in kinds:
        return f"{base} holds .tar files; if they are shards, `dtrain index {base}` makes their manifest"
    if ".arrow" in kinds:
        return f"{base} holds Arrow files of `save_to_disk`; write them with `Dataset.to_parquet` and pack those"
    if ".zip" in kinds:
        return f"{base} holds .zip files and no pictures; unpack them first"
    holds = "; ".join(summary(found.left_out)) or "nothing"
    return f"{base} holds no .jpg, .jpeg, .png or .webp files, but {holds}"


def _shown(names: list[str], most: int = 5) -> str:
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _file(item: tuple[str, int | None, str | None]) -> Files:
    path, label, caption = item
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; restore it, or take it out of the folder") from None
    field_of(data)  # the field is the name's, as it always was: decoders look at the bytes
    return captioned(labelled({SUFFIXES[os.path.splitext(path)[1].lower()]: data}, label), caption)
