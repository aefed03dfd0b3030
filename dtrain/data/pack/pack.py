"""Writes a data set as WebDataset shards with manifests: DEST/train and, where samples are held out, DEST/holdout.

A packed folder is a pure function of the request, byte for byte, whatever the number of processes and however often it
was killed on the way; pack.json in it records the request. Until it is whole it is called `.DEST.partial`.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dtrain.data.pack import left_out
from dtrain.data.pack.fitness import FORMATS
from dtrain.data.pack.left_out import LeftOut
from dtrain.data.pack.packed import Packed, packed
from dtrain.data.pack.source import Choice
from dtrain.data.pack.sources import open_source
from dtrain.data.pack.writing import Limits, write_shards
from dtrain.data.shards.indexing import index_shards
from dtrain.data.shards.manifest import check_shards, load, replacing
from dtrain.data.shards.parallel import WorkerKilled
from dtrain.errors import UserError
from dtrain.files import read_json
from dtrain.randomness import Draws, Purpose, permutation

REQUEST = "pack.json"
_LOCK, _SPOOL = ".lock", "spool"
_SIDEWAYS = (
    "packed when pictures lost their EXIF orientation on the way: photographs taken upright may lie on their side; "
    "remove it to pack anew"
)


def pack(
    source: str,
    destination: str | Path,
    holdout: int = 0,
    seed: int = 0,
    shard_samples: int | None = None,
    shard_bytes: int | None = None,
    format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    processes: int | None = None,
    choice: Choice | None = None,
) -> Packed:
    """Pack `source` into `destination`: shuffled by `seed`, its first `holdout` samples kept apart.

    source: `sklearn:digits`; a folder of JPEG, PNG and WebP files, or of class folders of them, whose classes are
    numbered in the order of their names, or with a metadata.jsonl or metadata.csv that holds the labels; Parquet files
    with a column of such files; an .npz with `images` uint8 (N, H, W[, C]) and `labels` (N,); the manifest.json of
    other shards; `torchvision:NAME`. choice: what to take of those that hold several splits or columns. Files are
    copied byte for byte, unless `format` (png, jpeg or webp; jpeg and webp with quality 95) asks for another; pixels
    of an .npz or of torchvision become PNG. Pictures that training would refuse are left out, and a table in the
    destination says which and why. shard_samples: by default at most 1,000, and fewer so that each split has
    at least eight shards; shard_bytes ends a shard that has so many bytes. progress: called with (samples done, of).
    processes: default one a core, one for few samples. A destination packed before by the same request is kept; any
    other that is not empty is refused, UserError. Of a call that was killed, the whole shards are kept by the next.
    """
    destination = Path(os.path.abspath(destination))
    choice = choice or Choice()
    if format not in (None, *FORMATS):
        raise UserError(f"--format {format} is not one of {', '.join(FORMATS)}")
    if shard_bytes is not None and shard_bytes < 1:
        raise UserError(f"a shard holds at least 1 byte, got {shard_bytes}")
    if shard_samples is not None and shard_samples < 1:
        raise UserError(f"a shard holds at least 1 sample, got {shard_samples}")
    if destination.is_relative_to(os.path.abspath(source)):
        raise UserError(f"{destination} lies in {source}, where it would be packed the next time; name a place outside")
    data = open_source(source, choice)
    if not 0 <= holdout < data.samples:
        raise UserError(f"--holdout {holdout} must leave a sample to train on: {source} has {data.samples}")
    data = data.ready(format)
    request = {
        "source": source if source.startswith(("sklearn:", "torchvision:")) else str(Path(source).resolve()),
        "content": data.content,
        "holdout": holdout,
        "seed": seed,
        "shard_samples": shard_samples,
        "shard_bytes": shard_bytes,
        "format": format,
    } | choice.request
    if format is not None:
        request["exif"] = "apply"
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        notes = data.notes + _check_request(destination, request)
        found = packed(destination, notes, kept=True)
        for split in ("train", "holdout") if found.holdout else ("train",):
            check_shards(load(destination / split / "manifest.json"), destination / split)
        return found

    order = permutation(Draws(seed).words(Purpose.SPLIT, 0, size=data.samples))
    skipped = list(data.left_out)
    total = data.samples * (1 if data.spool is None else 2)
    met = done = 0  # samples that were looked at, and with those that were spooled
    try:
        with _unfinished(destination, request) as folder:
            if data.spool is not None:
                data = replace(data, item=data.spool(folder / _SPOOL, _report(progress, 0, total)))
                done = data.samples
            for split, wanted in (("holdout", holdout), ("train", data.samples)):
                samples = order[met:]
                if not min(wanted, len(samples)):
                    continue
                limits = Limits(shard_samples or min(1000, -(-min(wanted, len(samples)) // 8)), shard_bytes)
                (folder / split).mkdir(exist_ok=True)
                prefix, record = folder / split / split, folder / f"{split}.done"
                report = _report(progress, done + met, total)
                written = write_shards(data, samples, wanted, prefix, limits, record, report, processes)
                met += written.met
                skipped += written.left_out
                if written.shards:
                    index_shards(written.shards, folder / split / "manifest.json", classes=data.classes)
            if not (folder / "train" / "manifest.json").exists():
                raise UserError(_none_left(source, holdout, skipped))
            left_out.write(folder, skipped)
            shutil.rmtree(folder / _SPOOL, ignore_errors=True)
            # With what `replacing` left where it was killed.
            for left in (*folder.glob("*.done"), *folder.rglob(".*.tmp"), folder / _LOCK):
                left.unlink()
            os.rename(folder, destination)
    except OSError as e:
        raise UserError(f"cannot pack {source} into {destination}: {e.strerror}; name a place with room") from None
    return packed(destination, data.notes, kept=False)


def _none_left(source: str, holdout: int, skipped: list[LeftOut]) -> str:
    reasons = "; ".join(left_out.summary(skipped))
    needs = f"more than the {holdout:,} of --holdout are" if holdout else "any is"
    return f"no sample of {source} is left to train on: see that {needs} fit; left out were {reasons}"


@contextmanager
def _unfinished(destination: Path, request: dict) -> Iterator[Path]:
    """The folder to write into, with what an equal request left there when it was killed, for this process alone.

    Removed after an error, so that nothing is left where nothing could come of it; kept after a kill or Ctrl-C.
    """
    folder = destination.with_name(f".{destination.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{destination} is being packed by another process; wait for it") from None
        try:
            text = json.dumps(request, indent=1) + "\n"
            asked = folder / REQUEST
            if not asked.exists() or asked.read_text() != text:
                for old in folder.iterdir():
                    if old.is_dir():
                        shutil.rmtree(old)
                    elif old.name != _LOCK:
                        old.unlink()
                with replacing(asked) as file:
                    file.write(text.encode())
            yield folder
        except WorkerKilled:
            raise
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _report(progress: Callable[[int, int], None] | None, before: int, of: int) -> Callable[[int], None]:
    """A function of the samples of one split done, that reports those of all splits."""
    return lambda done: progress(before + done, of) if progress else None


def _check_request(destination: Path, request: dict) -> tuple[str, ...]:
    """The folder was packed by the same request, or UserError with the first difference; lines to show about it."""
    other = "name another destination, or remove it to pack anew"
    try:
        before = read_json(destination / REQUEST)
        request = dict.fromkeys(before) | request
        differing = [key for key in request if before.get(key) != request[key]]
        sideways = "exif" in differing and "exif" not in before
        differing = [key for key in differing if key != "exif"] if sideways else differing
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{destination} exists and was not made by `dtrain pack`; {other}") from None
    if differing == ["content"]:
        raise UserError(f"{destination} was packed from {request['source']} when that held other files; {other}")
    if differing:
        key = next(key for key in differing if key != "content")
        raise UserError(f"{destination} was packed with {key} {before.get(key)!r}, not {request[key]!r}; {other}")
    return (_SIDEWAYS,) if sideways else ()
