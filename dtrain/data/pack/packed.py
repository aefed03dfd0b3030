"""What a packing left: how many samples, of which formats and classes, and what was not taken."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dtrain.data.pack import left_out
from dtrain.data.pack.left_out import LeftOut
from dtrain.data.shards.manifest import ABSENT, load
from dtrain.data.shards.sample_files import IMAGE_FIELDS, LABEL_FIELD

_SHOWN = 20  # classes


@dataclass(frozen=True)
class Packed:
    """What `pack` left at `destination`; prints as the line to show first.

    labelled: whether samples have class numbers; their names are known where there are `classes`. taken: pictures by
    field. left_out: of the source, by name and reason. notes: lines about what was taken.
    """

    destination: Path
    train: int
    holdout: int
    kept: bool  # was there already
    classes: list[str] | None
    labelled: bool
    taken: dict[str, int]
    left_out: list[LeftOut]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        held = f" and {self.holdout:,} held out" if self.holdout else ""
        verb = "keeping what is there:" if self.kept else "packed"
        return f"{self.destination}: {verb} {self.train:,} samples for training{held}"

    @property
    def report(self) -> str:
        """What was taken, what was left out and why, and the classes with their numbers."""
        lines = [str(self), *self.notes]
        lines.append("pictures: " + ", ".join(f"{count:,} {field}" for field, count in self.taken.items()))
        lines.append(_numbered(self.classes, self.labelled))
        if self.left_out:
            lines.append(f"left out {len(self.left_out):,}, each named in {self.destination / left_out.TABLE}:")
            lines += [f"  {line}" for line in left_out.summary(self.left_out)]
        return "\n".join(lines)


def packed(destination: Path, notes: tuple[str, ...], kept: bool) -> Packed:
    """What lies at a packed folder, as its own files say. Raises UserError where its manifests are damaged."""
    found = {}
    for split in ("train", "holdout"):
        path = destination / split / "manifest.json"
        if split == "train" or path.exists():
            found[split] = load(path)
    taken: Counter[str] = Counter()
    for manifest in found.values():
        for column, field in enumerate(manifest.fields):
            if field in IMAGE_FIELDS:
                taken[field] += int((manifest.members["size"][:, column] != ABSENT).sum())
    held_out = found["holdout"].samples if "holdout" in found else 0
    classes, labelled = found["train"].classes, LABEL_FIELD in found["train"].fields
    skipped = left_out.read(destination)
    return Packed(destination, found["train"].samples, held_out, kept, classes, labelled, dict(taken), skipped, notes)


def _numbered(classes: list[str] | None, labelled: bool) -> str:
    """`classes: 0 cat, 1 dog`."""
    if classes is None and labelled:
        return f"classes: the numbers in .{LABEL_FIELD}, as the source had them, without names"
    if classes is None:
        return "classes: none, to be trained with model.num_classes 0"
    if classes == [str(n) for n in range(len(classes))]:
        return f"classes: {len(classes):,}, named by their numbers 0 to {len(classes) - 1}"
    shown = [f"{n} {name}" for n, name in enumerate(classes[:_SHOWN])]
    more = [f"and {len(classes) - _SHOWN:,} more (`classes` in train/manifest.json)"] if len(classes) > _SHOWN else []
    return "classes: " + ", ".join([*shown, *more])
