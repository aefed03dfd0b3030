"""What a packing left out, by name and reason: kept as a table beside the shards, shown by kind and reason."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dtrain.data.shards.manifest import replacing
from dtrain.files import read_bytes
from dtrain.terminal import printable

LARGEST = 1 << 30  # bytes of it
TABLE = "left-out.tsv"  # in the packed folder: name, kind, reason
_FIRST, _KINDS = 3, 12  # names of one kind that are shown, and kinds


class Unfit(Exception):
    """A sample that training would refuse. Its only argument is the reason in a few words, the same for all alike."""


@dataclass(frozen=True)
class LeftOut:
    """name: of a file relative to the source, or of a table's row. kind: a file's extension, or what else it is."""

    name: str
    kind: str
    reason: str

    @classmethod
    def file(cls, name: str, reason: str) -> "LeftOut":
        return cls(name, Path(name).suffix.lower() or "without extension", reason)


def write(folder: Path, left_out: Iterable[LeftOut]) -> None:
    """One line for each, by name. Where there is none there is no table."""
    left_out = sorted(left_out, key=lambda one: one.name)
    # Names may hold tabs, line breaks and bytes that are no UTF-8.
    lines = ["\t".join(printable(part) for part in (one.name, one.kind, one.reason)) + "\n" for one in left_out]
    if lines:
        with replacing(folder / TABLE) as file:
            file.writelines(line.encode() for line in lines)


def read(folder: Path) -> list[LeftOut]:
    try:
        lines = read_bytes(folder / TABLE, LARGEST).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [LeftOut(*parts) for line in lines if len(parts := line.split("\t")) == 3]


def summary(left_out: Iterable[LeftOut]) -> list[str]:
    """`3 .txt (no picture): a.txt, b.txt, …`, the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in left_out:
        groups.setdefault((one.kind, one.reason), []).append(one.name)
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    lines = []
    for (kind, reason), names in ordered[:_KINDS]:
        shown = [printable(name) for name in names[:_FIRST]] + (["…"] if len(names) > _FIRST else [])
        lines.append(f"{len(names):,} {kind} ({reason}): {', '.join(shown)}")
    if more := ordered[_KINDS:]:
        lines.append(f"{sum(len(names) for _, names in more):,} more of {len(more)} other kinds")
    return lines
