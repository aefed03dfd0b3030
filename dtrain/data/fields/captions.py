"""The captions of a data set, as far as a look at some of them says. Imports no torch and no NumPy."""

from dataclasses import dataclass
from pathlib import Path

from dtrain.data.fields.caption import Caption
from dtrain.data.shards.lacking import Lack
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.members import evenly, open_members
from dtrain.data.shards.remote import is_url
from dtrain.errors import BadSample

_LONGEST = 1 << 20  # bytes of a member that are read


@dataclass(frozen=True)
class Captions:
    """looked_at: how many. empty: of these, without words. truncated: of these, longer than is told.

    wrong: samples whose caption cannot be read; None where there is none.
    """

    name: str
    place: str
    looked_at: int = 0
    empty: int = 0
    truncated: int = 0
    wrong: Lack | None = None

    def __str__(self) -> str:
        parts = [f"{self.empty:,} without words, told nothing"] if self.empty else []
        parts += [f"{self.truncated:,} longer than conditions.{self.name}.length, cut"] if self.truncated else []
        of = f"{self.looked_at:,} captions of {self.place} looked at"
        return f"{of}: {', '.join(parts)}" if parts else of


def look(manifest: Manifest, directory: str | Path, field: Caption, most: int) -> Captions:
    """What is in `most` captions of a local data set, spread over it. Nothing of a remote one.

    What cannot be read or is damaged is passed over: whoever reads the shard for its pictures names it.
    """
    (extension,) = field.extensions
    if extension not in manifest.fields or is_url(directory):
        return Captions(field.name, field.place)
    samples = evenly(manifest, most)
    looked_at = empty = truncated = wrong = 0
    first = ""
    with open_members(manifest, directory) as members:
        for sample in samples:
            try:
                words = field.words(members.head(sample, extension, _LONGEST))
            except (KeyError, OSError):
                continue
            except BadSample as e:
                wrong, first = wrong + 1, first or f"sample {sample} {e}"
                continue
            looked_at, empty = looked_at + 1, empty + (not words)
            truncated += field.is_long(words)
    what = f"no caption at {field.place} in {wrong:,} of {len(samples):,} samples looked at; first: {first}"
    lack = Lack(wrong, len(samples), what) if wrong else None
    return Captions(field.name, field.place, looked_at, empty, truncated, lack)
