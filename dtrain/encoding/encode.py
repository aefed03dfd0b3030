"""`dtrain encode`: what frozen networks say of a data set, as shards that are a pure function of it and the request.

Each shard of the source becomes one, on whichever rank; what it holds, and its statistics, depend on nothing else. So
the cache has the same bytes at any number of ranks and however often it was killed (design, decision 11).
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dtrain import distributed
from dtrain.data.fields.survey import survey
from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.cache import BlockCache
from dtrain.data.shards.indexing import index_shards
from dtrain.data.shards.latents import Latents
from dtrain.data.shards.manifest import ABSENT, Manifest
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.remote import is_url
from dtrain.data.shards.sample_files import IMAGE_FIELDS
from dtrain.encoding.captions import CaptionRequest, Captions
from dtrain.encoding.captions import merged as merged_counts
from dtrain.encoding.pictures import PictureRequest, Pictures
from dtrain.encoding.pictures import merged as merged_statistics
from dtrain.errors import UserError
from dtrain.files import read_json, replacing
from dtrain.terminal import size as shown

REQUEST = "encode.json"
PIECE = 64  # samples read and decoded ahead, at least
_LOCK = ".lock"
_BLOCK = 512  # bytes of a tar file's header, and what its members are aligned to


class Request(NamedTuple):
    """What is made of a data set: latents of its pictures, what a text encoder says of its captions, or both.

    statistics_only: of the latents, without shards.
    """

    pictures: PictureRequest | None = None
    captions: CaptionRequest | None = None
    statistics_only: bool = False

    @property
    def block(self) -> int:
        return next(one.block for one in (self.pictures, self.captions) if one is not None)

    def checked(self, source: Manifest) -> dict:
        """All that decides the cache's bytes, as plain data. Raises UserError for what cannot be."""
        if self.pictures is None and self.captions is None:
            raise UserError("say what is encoded: --first-stage FOLDER for latents, --text FOLDER for words, or both")
        if self.statistics_only and (self.pictures is None or self.captions is not None):
            raise UserError("--statistics-only is of latents, and needs --first-stage without --text")
        asked = {"source": source.hash} | ({} if self.pictures is None else self.pictures.checked(source))
        words = {} if self.captions is None else self.captions.checked(source)
        return asked | {f"text.{key}": value for key, value in words.items()}

    def made(self) -> list[Pictures | Captions]:
        """What makes them, on this rank's device."""
        device = distributed.device()
        of_pictures = [] if self.pictures is None else [Pictures(self.pictures, device)]
        return of_pictures + ([] if self.captions is None else [Captions(self.captions, device)])

    def copied(self, source: Manifest) -> list[str]:
        """Fields of the source that the cache has as they are."""
        return [field for field in source.fields if self.pictures is None or field not in IMAGE_FIELDS]


def quiet(*_) -> None:
    """Says nothing."""


def encode(
    shards: str,
    destination: str,
    request: Request,
    on_progress: Callable[[int, int], None] = quiet,
    on_line: Callable[[str], None] = quiet,
) -> str:
    """Encode a data set into the folder `destination`, or its statistics alone into that file; a line that says what.

    shards: a folder with a manifest.json, or the manifest. on_progress: called with the samples that this rank has
    done, and of how many. on_line: with what is to be known before, on rank 0. A destination that an equal request made
    is kept, any other that holds something refused. Of a call that was killed, the whole shards are kept by the next. A
    collective; raises UserError.
    """
    if is_url(destination):
        raise UserError(
            f"{destination} is no local folder; encode into one, copy it there, and name its address in data.shards "
            "and its manifest.json in data.manifest"
        )
    target = Path(os.path.abspath(destination))
    path = Path(shards) / "manifest.json" if Path(shards).is_dir() else Path(shards)
    source: Manifest = distributed.agree(manifests.load, path)
    distributed.on_rank_0(manifests.check_shards, source, source.place)
    asked = distributed.agree(request.checked, source)
    if distributed.on_rank_0(_is_there, target, asked, request.statistics_only):
        return f"{target}: keeping what is there, which the same request made"
    folder = target.with_name(f".{target.name}.partial")
    for line in distributed.on_rank_0(_before, request, source, folder):
        if distributed.rank() == 0:
            on_line(line)
    with unfinished(folder, asked):
        work = _Work(source, request, folder)
        distributed.agree(work.do, on_progress)
        return distributed.on_rank_0(_finish, work, asked, target)


class _Work:
    """This rank's shards, one after the other."""

    def __init__(self, source: Manifest, request: Request, folder: Path):
        self.source, self.request, self._folder = source, request, folder
        self._ends = np.cumsum(source.shard_sizes).tolist()
        self.made, self._copied = request.made(), request.copied(source)
        self._prefix = "latents" if request.pictures else "words"

    def shard(self, number: int) -> Path:
        return self._folder / f"{self._prefix}-{number:06d}.tar"

    def note(self, number: int) -> Path:
        """What is counted of a shard, written before the shard has its name."""
        return self.shard(number).with_suffix(".json")

    def do(self, on_progress) -> None:
        rank, world_size = distributed.rank(), distributed.world_size()
        mine = range(rank, len(self._ends), world_size)
        sizes = [self.source.shards[number].samples for number in mine]
        todo = [number for number in mine if not self._is_whole(number)]
        done = sum(sizes) - sum(self.source.shards[number].samples for number in todo)
        on_progress(done, sum(sizes))
        if not todo:
            return
        reader = ShardReader(self.source, self.source.place, BlockCache(None, 16 << 30))
        threads = max(1, len(os.sched_getaffinity(0)) // distributed.local_world_size())
        with ThreadPoolExecutor(threads) as pool:
            for number in todo:
                try:
                    self._encode(number, reader, pool, lambda n, done=done: on_progress(done + n, sum(sizes)))
                except OSError as e:
                    raise UserError(f"cannot write {self._folder}: {e.strerror}; name a place with room") from None
                done += self.source.shards[number].samples

    def notes(self, key: str) -> list[dict]:
        """Of all shards, in their order, what one of `made` says."""
        return [read_json(self.note(number))[key] for number in range(len(self._ends))]

    def _is_whole(self, number: int) -> bool:
        try:
            whole = read_json(self.note(number)).keys() == {one.key for one in self.made}
        except (OSError, ValueError, AttributeError):
            return False
        return whole and (self.request.statistics_only or self.shard(number).exists())

    def _encode(self, number: int, reader: ShardReader, pool, on_sample) -> None:
        from webdataset import TarWriter

        samples = range(self._ends[number] - self.source.shards[number].samples, self._ends[number])
        temporary, only = self.shard(number).with_suffix(".tar.tmp"), self.request.statistics_only
        for one in self.made:
            one.start_shard()
        with open(os.devnull if only else temporary, "wb") as file:
            with TarWriter(file, mtime=0, encoder=False) as writer:
                for sample, fields in self._samples(samples, reader, pool):
                    writer.write({"__key__": f"{sample:08d}"} | fields)
                    on_sample(sample + 1 - samples.start)
            if not only:
                file.flush()
                os.fsync(file.fileno())
        with replacing(self.note(number)) as note:
            note.write(json.dumps({one.key: one.note() for one in self.made}).encode())
        if not only:
            os.replace(temporary, self.shard(number))

    def _samples(self, samples: range, reader: ShardReader, pool) -> Iterator[tuple[int, dict[str, bytes]]]:
        """(sample, its files in the cache) of each; the source is read and decoded a piece ahead.

        Blocks begin with the shard, so that they are the same at any number of ranks.
        """
        block = self.request.block
        size = block * -(-PIECE // block)
        pieces = (samples[first : first + size] for first in range(0, len(samples), size))
        begun = self._begun(next(pieces), reader, pool)
        while begun is not None:
            piece, files, own = begun
            following = next(pieces, None)
            begun = None if following is None else self._begun(following, reader, pool)
            made = zip(*(one.made(work) for one, work in zip(self.made, own, strict=True)), strict=True)
            for sample, others, contents in zip(piece, files, made, strict=True):
                new = {one.member: content for one, content in zip(self.made, contents, strict=True)}
                yield sample, {name: others[name] for name in self._copied if name in others} | new

    def _begun(self, piece: range, reader: ShardReader, pool):
        """(the samples, their files, what each of `made` has begun of them)."""
        wanted = tuple(dict.fromkeys([*(field for one in self.made for field in one.reads), *self._copied]))
        reader.prefetch(piece, wanted)
        files = [reader.read(sample, wanted) for sample in piece]
        return piece, files, [one.begin(piece, files, reader, pool) for one in self.made]


def _before(request: Request, source: Manifest, folder: Path) -> list[str]:
    """On rank 0: what is to be known before the work begins. Raises UserError where the disk has too little room."""
    scaling = request.pictures and survey(source, source.place).scaling(request.pictures.size)
    lines = [scaling] if scaling else []
    if request.statistics_only:
        return lines
    whole, parts = 0.0, []
    for one in request.made():
        size, said = one.size(source)
        own = source.samples * (_BLOCK + size + _BLOCK / 2)
        whole, parts = whole + own, [*parts, f"{shown(own)} of {said}"]
    columns = [source.fields.index(field) for field in request.copied(source)]
    sizes = source.members["size"][:, columns].astype(np.int64)
    others = int((_BLOCK + -(-sizes // _BLOCK) * _BLOCK)[sizes != ABSENT].sum())
    lines.append(f"about {shown(whole + others)}: {', '.join(parts)}, {shown(others)} of other files")
    there = folder
    while not there.exists():
        there = there.parent
    written = sum(file.stat().st_size for file in folder.iterdir()) if folder.exists() else 0
    if (free := shutil.disk_usage(there).free) < whole + others - written:
        raise UserError(f"{lines[-1]}; {there} has {shown(free)} free: name a place with room")
    return lines


def _finish(work: _Work, asked: dict, target: Path) -> str:
    """On rank 0, once all shards are whole: the manifest, or the file of statistics. A line that says what."""
    source, folder, latents, said = work.source, work.shard(0).parent, work.source.latents, []
    embeddings = list(source.embeddings)
    if work.request.pictures:
        found = merged_statistics(work.notes("latents"))
        mean, deviation = found.mean.tolist(), found.deviation.tolist()
        own = {key: value for key, value in asked.items() if not key.startswith("text.")}
        latents = Latents(**own, mean=mean, deviation=deviation)
        scale = ", ".join(f"{m:.3g} ± {d:.3g}" for m, d in zip(mean, deviation, strict=True))
        what = "statistics" if work.request.statistics_only else "latents"
        said.append(f"{what} of {source.samples:,} pictures, {asked['shape']} each; channels {scale}")
    if work.request.captions:
        own = {key.removeprefix("text."): value for key, value in asked.items() if key.startswith("text.")}
        embeddings.append(merged_counts(own, work.notes("embeddings")))
        said.append(embeddings[-1].about)
    try:
        if work.request.statistics_only:
            with replacing(target) as file:
                file.write(json.dumps({"format": 1, "latents": latents.model_dump()}, indent=1).encode() + b"\n")
            shutil.rmtree(folder, ignore_errors=True)
            return f"{target}: {said[0]}"
        shards = [work.shard(number) for number in range(len(source.shards))]
        caches = {"latents": latents, "embeddings": embeddings}
        index_shards(shards, folder / "manifest.json", classes=source.classes, **caches)
        # With what `replacing` left where it was killed.
        for left in (*folder.glob("*.json"), *folder.glob(".*.tmp"), *folder.glob("*.tar.tmp"), folder / _LOCK):
            if left.name not in (REQUEST, "manifest.json"):
                left.unlink(missing_ok=True)
        os.rename(folder, target)
    except OSError as e:
        raise UserError(f"cannot write {target}: {e.strerror}; name a place with room") from None
    return f"{target}: {'; '.join(said)}"


def _is_there(target: Path, asked: dict, statistics_only: bool) -> bool:
    """Whether it holds what the request would make. Raises UserError where it holds something else."""
    if not target.exists() or (target.is_dir() and not statistics_only and not any(target.iterdir())):
        return False
    other = "name another destination, or remove it to encode anew"
    try:
        if statistics_only:
            before = {k: v for k, v in read_json(target)["latents"].items() if k not in ("mean", "deviation")}
        else:
            before = read_json(target / REQUEST)
        more = [] if statistics_only else [key for key in before if key not in asked]
        differing = [key for key in (*asked, *more) if before.get(key) != asked.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{target} exists and was not made by `dtrain encode`; {other}") from None
    if differing:
        key = differing[0]
        raise UserError(
            f"{target} was made with {key} {str(before.get(key))[:20]}, not {str(asked.get(key))[:20]}; {other}"
        )
    if not statistics_only:
        manifests.check_shards(manifests.load(target / "manifest.json"), target)
    return True


@contextmanager
def unfinished(folder: Path, asked: dict) -> Iterator[None]:
    """The folder to write into, with what an equal request left there, for this call alone. A collective.

    It stays after an error: the shards in it took long.
    """
    lock = None

    def take() -> None:
        nonlocal lock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / _LOCK, "w")  # noqa: SIM115 (held until the work is done)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            text = json.dumps(asked, indent=1) + "\n"
            if not (folder / REQUEST).exists() or (folder / REQUEST).read_text() != text:
                for old in folder.iterdir():
                    if old.is_dir():
                        shutil.rmtree(old)
                    elif old.name != _LOCK:
                        old.unlink()
                with replacing(folder / REQUEST) as file:
                    file.write(text.encode())
        except BlockingIOError:
            raise UserError(f"{folder} is being written by another process; wait for it") from None
        except OSError as e:
            raise UserError(f"cannot write {folder}: {e.strerror}; name a writable place") from None

    try:
        distributed.on_rank_0(take)
        yield
    finally:
        if lock is not None:
            lock.close()
