"""From whatever a user has to shards with a manifest: packed, indexed, or as they are. Nothing is overwritten."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.indexing import common_folder, find_shards, index_shards
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.members import evenly
from dtrain.data.shards.remote import is_url
from dtrain.data.shards.sample_files import LABEL_FIELD
from dtrain.errors import UserError

MANIFEST = "manifest.json"
FOLDER = Path("data")  # what is packed or indexed goes to FOLDER/NAME
LEAST_SHARDS = 8  # of which one can be held out
LABELS_COMPARED = 256  # of the held-out shard and of the others

Say = Callable[[str], None]


@dataclass(frozen=True)
class DataSet:
    """Shards to train on, as the keys of `data` name them. remark: on the split that is held out, or that none is."""

    name: str
    shards: str
    manifest: str | None = None  # None: beside the shards
    holdout: str | None = None
    holdout_shards: str | None = None
    remark: str | None = None

    @property
    def manifest_path(self) -> Path:
        return Path(self.manifest) if self.manifest else Path(self.shards) / MANIFEST


def find(data: str, name: str | None, say: Say, progress: Callable[[int, int], None]) -> DataSet:
    """The data set that `data` is, or becomes.

    data: what `dtrain pack` left; a folder with a manifest.json, or that file; a folder or pattern of shards without
    one, which are indexed; or anything that `dtrain pack` packs, which is packed. say: called with a line about what is
    made and by which command. Raises UserError.
    """
    if is_url(data):
        raise UserError(
            f"{data} is remote, and init looks at local data; index it with `dtrain index {data} --out "
            f"{FOLDER}/NAME/{MANIFEST}` and start from a file of configs/"
        )
    path = Path(data)
    if (path / "train" / MANIFEST).is_file():
        return _packed(path, name)
    if (path / MANIFEST).is_file():
        return _with_manifest(path / MANIFEST, name)
    if path.name == MANIFEST:
        return _with_manifest(path, name)
    if any(path.glob("*.tar")) or data.endswith(".tar"):
        return _indexed(data, name or named_after(data), say)
    return _pack(data, name or named_after(data), say, progress)


def named_after(data: str) -> str:
    """A name for the data and the run: letters, digits, `.`, `_` and `-`."""
    if ":" in data and not Path(data).exists():  # sklearn:digits
        last = data.rpartition(":")[2]
    else:
        path = Path(data).resolve()
        if data.endswith(".tar"):
            path = path.parent
        last = path.stem if path.is_file() else path.name
    return re.sub(r"[^\w.\-]+", "-", last).strip("-.") or "data"


def _packed(path: Path, name: str | None) -> DataSet:
    holdout = path / "holdout" / MANIFEST
    return DataSet(
        name or named_after(str(path)),
        str(path / "train"),
        holdout=str(holdout) if holdout.is_file() else None,
        remark=None if holdout.is_file() else _advice(path / "train" / MANIFEST, name or path.resolve().name),
    )


def _with_manifest(path: Path, name: str | None) -> DataSet:
    """A manifest whose shards lie beside it. A split called holdout beside a folder called train belongs to it.

    Raises UserError where they lie elsewhere, which a manifest does not say.
    """
    folder = path.parent
    first = manifests.load(path).shards[0].name
    if not (folder / first).exists():
        raise UserError(f"{path} is an index of shards that are not beside it; give init the folder that holds {first}")
    if folder.resolve().name == "train":
        return _packed(folder.parent if folder.name == "train" else folder.resolve().parent, name)
    name = name or named_after(str(folder))
    return DataSet(name, str(folder), remark=_advice(path, name))


def _advice(manifest: Path, name: str) -> str:
    again = shlex.join(["dtrain", "pack", str(manifest), f"{FOLDER}/{name}-split", "--holdout", "1000"])
    return f"nothing is held out, so nothing is evaluated; to hold some out: {again}"


def _indexed(data: str, name: str, say: Say) -> DataSet:
    """Manifests in FOLDER/NAME of shards that stay where they are, one held out where there are enough."""
    shards = [str(shard) for shard in find_shards(data)]
    place, whole, held = common_folder(shards), FOLDER / name / MANIFEST, FOLDER / name / "holdout.json"
    if whole.exists():
        return _kept(data, name, place, shards)
    if len(shards) >= LEAST_SHARDS:
        say(f"indexing {len(shards) - 1} shards of {data} in {whole}, and the first, which is held out, in {held}")
        # The first, as the last is often a short one.
        holdout, training = index_shards(shards[:1], held), index_shards(shards[1:], whole)
        if not _sorted_by_class(training, holdout, place):
            return DataSet(name, place, str(whole), str(held), place, _of_a_shard(holdout))
        held.unlink()
        held.with_suffix(".members").unlink()
        say(f"the shards of {data} are sorted by class, so none of them can stand for all")
    say(f"indexing {len(shards)} shards of {data} in {whole}; nothing is held out")
    index_shards(shards, whole)
    return DataSet(name, place, str(whole), remark="nothing is held out, so nothing is evaluated while it trains")


def _kept(data: str, name: str, place: str, shards: list[str]) -> DataSet:
    """The manifests of an earlier call."""
    whole, held = FOLDER / name / MANIFEST, FOLDER / name / "holdout.json"
    found = [manifests.load(path) for path in (whole, held) if path.exists()]
    names = sorted(str(Path(place) / shard.name) for manifest in found for shard in manifest.shards)
    if names != sorted(shards):
        raise UserError(f"{whole} is of other shards than {data}; give these another name with --name")
    for manifest in found:
        manifests.check_shards(manifest, place)
    if len(found) == 1:
        return DataSet(name, place, str(whole), remark="nothing is held out, so nothing is evaluated while it trains")
    return DataSet(name, place, str(whole), str(held), place, _of_a_shard(found[1]))


def _of_a_shard(holdout: Manifest) -> str:
    return f"{holdout.shards[0].name}, one shard of a shuffled data set"


def _sorted_by_class(training: Manifest, holdout: Manifest, place: str) -> bool:
    """Whether one shard has far fewer classes than as many samples from all others."""
    if LABEL_FIELD not in training.fields:
        return False
    one, others = (len(set(some_labels(m, place, LABELS_COMPARED))) for m in (holdout, training))
    return one < others / 2


def some_labels(manifest: Manifest, directory: str, count: int) -> list[int]:
    """The labels of `count` samples spread evenly over a local data set, or of all. Raises UserError."""
    from dtrain.data.fields.samples import label_of
    from dtrain.data.shards.reader import ShardReader

    reader = ShardReader(manifest, directory)
    return [label_of(reader, sample) for sample in evenly(manifest, count)]


def _pack(source: str, name: str, say: Say, progress: Callable[[int, int], None]) -> DataSet:
    from dtrain.data.pack.pack import REQUEST, pack
    from dtrain.data.pack.sources import open_source

    destination = FOLDER / name
    if destination.resolve() == Path(source).resolve():  # pictures that lie where packed ones would
        destination = FOLDER / f"{name}-shards"
    samples = open_source(source).samples
    if destination.exists():
        made_from = None
        if (destination / REQUEST).is_file():
            made_from = json.loads((destination / REQUEST).read_text()).get("source")
        if made_from not in (source, str(Path(source).resolve())):
            raise UserError(f"{destination} exists and was not packed from {source}; give this one a name with --name")
        say(f"{destination} was packed from {source} before")
        return _packed(destination, name)
    holdout = held_out(samples)
    words = ["dtrain", "pack", source, str(destination), "--holdout", str(holdout)]
    say(shlex.join(words))
    packed = pack(source, destination, holdout, progress=progress)
    for line in packed.report.splitlines():
        say(line)
    return _packed(destination, name)


def held_out(samples: int) -> int:
    """How many to keep apart: a tenth, of few samples up to a fifth, and never more than 5,000."""
    return min(5000, max(samples // 10, min(360, -(-samples // 5))))
