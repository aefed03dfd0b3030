"""What a data set consists of: `manifest.json` beside its shards, and a memory-mapped side file of member positions.

    {"format": 1, "fields": ["cls", "jpg"],
     "shards": [{"name": "train-000000.tar", "samples": 2000, "bytes": 5140480, "sha256": "…"}, …],
     "classes": ["airplane", …] or null,
     "members": {"file": "manifest.members", "sha256": "…"},
     "latents": {…},  of a latent cache alone (`latents.py`)
     "embeddings": [{…}, …],  where there are cached words (`embeddings.py`)
     "pairs": {…}}  of pairs of noise and samples alone (`pairs.py`)

The side file is a (samples, fields) table in the manifest's order of one 16-byte little-endian record a member: offset
uint64, size uint32, crc32 uint32. A field that a sample lacks has size 0xFFFFFFFF.
"""

import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dtrain import files
from dtrain.config import Data
from dtrain.data.shards.checked import checked
from dtrain.data.shards.embeddings import Embeddings
from dtrain.data.shards.latents import Latents
from dtrain.data.shards.pairs import Pairs
from dtrain.data.shards.remote import is_pipe, is_url
from dtrain.errors import UserError, from_where

if TYPE_CHECKING:  # whoever only asks what the data are, such as a job's submission, waits for no numpy
    import numpy as np

FORMAT = 1
RECORD = [("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")]  # of the side file, as a NumPy dtype
RECORD_BYTES = 16
ABSENT = 0xFFFFFFFF  # the size of a field that a sample does not have
LARGEST = 1 << 30  # bytes of a manifest

Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _below(name: str) -> str:
    """Raises ValueError for a name that leads out of the folder it is looked for in."""
    leads_out = not name or name[0] == "/" or "\0" in name or (".." in name and ".." in name.split("/"))
    if leads_out and not is_pipe(name):
        raise ValueError(f"{name!r} leads out of the folder of the shards")
    return name


def _beside(name: str) -> str:
    """Raises ValueError for what is not a file's name alone."""
    if name != os.path.basename(_below(name)) or name in ("", "."):
        raise ValueError(f"{name!r} does not lie beside the manifest")
    return name


class Shard(_Record):
    name: Annotated[str, AfterValidator(_below)]  # relative to the folder of the shards
    samples: Positive
    bytes: Positive
    sha256: Sha256


class SideFile(_Record):
    file: Annotated[str, AfterValidator(_beside)]
    sha256: Sha256


class Document(_Record):
    """manifest.json as it is written."""

    format: int
    fields: Annotated[list[str], Field(min_length=1, max_length=64)]
    shards: Annotated[list[Shard], Field(min_length=1)]
    classes: list[str] | None
    members: SideFile
    latents: Latents | None = None
    embeddings: list[Embeddings] = []
    pairs: Pairs | None = None

    def as_json(self) -> bytes:
        tree = self.model_dump()
        for key in ("latents", "embeddings", "pairs"):
            if not tree[key]:
                del tree[key]
        return json.dumps(tree, indent=1).encode() + b"\n"


@dataclass(frozen=True, eq=False)
class Manifest:
    """A data set: samples are numbered through its shards in this order."""

    path: Path
    fields: list[str]
    shards: list[Shard]
    classes: list[str] | None
    side: Path  # the file that `members` maps
    mixed: tuple["Manifest", ...] = ()  # further data sets, which count in the hash
    shards_at: str | None = None  # folder or URL of a held-out split's shards, where it is not the manifest's own
    latents: Latents | None = None  # what a latent cache was made of
    embeddings: tuple[Embeddings, ...] = ()  # and cached words, of each condition that has some
    pairs: Pairs | None = None  # and what pairs of noise and samples were drawn from
    complete: bool = False  # whether it is known that no sample lacks a field
    remarks: tuple[str, ...] = ()  # what indexing saw that a training would stumble over; not kept in the file

    @property
    def place(self) -> str:
        """The folder or URL of the shards, of a manifest that is not data.shards' own."""
        return self.shards_at or str(self.path.parent)

    @cached_property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def members(self) -> "np.ndarray":
        """(N, F) records `offset`, `size`, `crc32`, read-only, memory-mapped; `size` is ABSENT where a field is."""
        import numpy as np

        return np.memmap(self.side, dtype=np.dtype(RECORD), mode="r", shape=(self.samples, len(self.fields)))

    @cached_property
    def shard_sizes(self) -> "np.ndarray":
        """Samples of each shard (S,) int64."""
        import numpy as np

        return np.array([s.samples for s in self.shards], dtype=np.int64)

    @cached_property
    def hash(self) -> str:
        """Identifies the data: what the shards hold and in which order, not their names nor where they lie."""
        # As JSON has [samples, bytes, sha256] of each, without a list for each of 100,000.
        shards = ",".join([f'[{s.samples},{s.bytes},"{s.sha256}"]' for s in self.shards])
        cache = [] if self.latents is None else [self.latents.model_dump()]
        cache += [one.model_dump() for one in self.embeddings]
        parts = [json.dumps(part, separators=(",", ":")) for part in (self.fields, self.classes, *cache)]
        content = f"[{','.join([*parts[:2], f'[{shards}]', *parts[2:]])}]"
        own = hashlib.sha256(content.encode()).hexdigest()
        if not self.mixed:
            return own
        return hashlib.sha256(" ".join([own, *(m.hash for m in self.mixed)]).encode()).hexdigest()


def load_all(data: Data) -> Manifest:
    """The manifest of data.shards, with those of data.mix. Raises UserError."""
    return replace(load(data.manifest_path), mixed=tuple(load(source.manifest_path) for source in data.mix))


def load_holdout(data: Data) -> Manifest:
    """The manifest of data.holdout, which knows where its shards lie. Raises UserError."""
    return replace(load(data.holdout), shards_at=data.holdout_shards)


def check_all(manifest: Manifest, data: Data) -> None:
    """Every local shard is there with the manifest's bytes, or UserError names the first that is not.

    With data.on_error "replace", up to data.max_bad_fraction of the samples may be in shards that are not. Remote
    shards are met when they are read.
    """
    for one, source in zip((manifest, *manifest.mixed), (data, *data.mix), strict=True):
        if is_url(source.shards):
            continue
        allowed = data.max_bad_fraction * one.samples if data.on_error == "replace" else 0.0
        problems = [(shard, problem) for shard in one.shards if (problem := shard_problem(one, source.shards, shard))]
        if sum(shard.samples for shard, _ in problems) > allowed:
            raise UserError(f"{problems[0][1]}; restore it or run `dtrain index` again")


def load(path: str | Path) -> Manifest:
    """Read a manifest and check its side file.

    Raises UserError where either is missing, damaged, of another format, or does not belong to the other.
    """
    path = Path(path)
    again = "run `dtrain index` on the shards again"
    try:
        tree = files.read_json(path, LARGEST)
    except FileNotFoundError:
        raise UserError(f"there is no manifest {path}{from_where(path)}; `dtrain index SHARDS` makes it") from None
    except OSError as e:
        raise UserError(f"cannot read the manifest {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}); {again}") from None
    try:
        if isinstance(tree, dict) and tree.get("format", FORMAT) != FORMAT:
            raise UserError(f"{path} has format {tree['format']!r}, this version reads {FORMAT}; {again}")
        document = Document.model_validate(tree)
    except ValidationError as e:
        where = ".".join(map(str, e.errors()[0]["loc"])) or "the whole file"
        raise UserError(f"{path} is not a manifest ({where}: {e.errors()[0]['msg']}); {again}") from None

    manifest = _of(document, path)
    side = manifest.side
    try:
        with open(side, "rb", opener=files.opener) as file:
            size = os.fstat(file.fileno()).st_size
            expected = manifest.samples * len(manifest.fields) * RECORD_BYTES
            if size != expected:
                raise UserError(f"{side} has {size:,} bytes, {path} asks for {expected:,}; {again}")
            found = checked(file, document.members.sha256)
            if found is None:
                raise UserError(f"{side} is damaged or does not belong to {path} (other sha256); {again}")
    except OSError as e:
        raise UserError(f"cannot read {side}, which {path} needs: {e.strerror}; {again}") from None
    return replace(manifest, complete=found)


def check_shards(manifest: Manifest, directory: str | Path) -> None:
    """Every shard is in `directory` with exactly the manifest's bytes, or UserError names the first that is not.

    Remote shards are met when they are read.
    """
    if is_url(directory):
        return
    for shard in manifest.shards:
        if problem := shard_problem(manifest, directory, shard):
            raise UserError(f"{problem}; restore it or run `dtrain index` again")


def shard_problem(manifest: Manifest, directory: str | Path, shard: Shard) -> str | None:
    """What is wrong with a local shard, as far as its directory entry tells."""
    path = Path(directory) / shard.name
    try:
        size = path.stat().st_size
    except OSError as e:
        return f"cannot find the shard {path} of {manifest.path}: {e.strerror}"
    if size != shard.bytes:
        difference = f"{abs(size - shard.bytes):,} bytes {'shorter' if size < shard.bytes else 'longer'}"
        return f"{path} is {difference} than its manifest says"
    return None


def glance(path: str | Path) -> Manifest | None:
    """What a manifest's own file says, even where its side file or shards are damaged or gone; None without one."""
    path = Path(path)
    try:
        document = Document.model_validate_json(files.read_bytes(path, LARGEST))
    except (OSError, ValueError):
        return None
    return _of(document, path)


def _of(document: Document, path: Path) -> Manifest:
    side = path.parent / document.members.file
    caches = {"latents": document.latents, "embeddings": tuple(document.embeddings), "pairs": document.pairs}
    return Manifest(path, document.fields, document.shards, document.classes, side, **caches)


def class_names(path: Path) -> list[str] | None:
    """Those of an existing manifest, even where its side file or shards are damaged."""
    found = glance(path)
    return None if found is None else found.classes


@contextmanager
def replacing(path: Path):
    """A file to write that takes the place of `path` when the block ends without an error, and never in part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            yield file
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; name a writable place with `--out`") from None
