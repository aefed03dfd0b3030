"""`dtrain encode`: the latents of a data set as shards of their own, a pure function of the pictures and the request.

Each shard of pictures becomes one of moments, on whichever rank; what it holds, and its statistics, depend on nothing
else. So the cache has the same bytes at any number of ranks and however often it was killed (design, decision 11).
"""

import fcntl
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch

from dtrain import distributed
from dtrain.config.autoencoders import described
from dtrain.data.fields.field import Picture, View
from dtrain.data.fields.picture import Crop, normalize
from dtrain.data.fields.samples import read_field
from dtrain.data.fields.survey import survey
from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.cache import BlockCache
from dtrain.data.shards.indexing import index_shards
from dtrain.data.shards.latents import RANGE, Latents
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.remote import is_url
from dtrain.data.shards.sample_files import IMAGE_FIELDS, MOMENTS_FIELD
from dtrain.errors import BadSample, UserError
from dtrain.files import read_json, replacing
from dtrain.first_stage.autoencoder import Autoencoder, load
from dtrain.first_stage.requirements import encoder
from dtrain.first_stage.statistics import ChannelStatistics

REQUEST = "encode.json"
PIECE = 64  # pictures decoded ahead, at least
_LOCK = ".lock"


@dataclass(frozen=True)
class Request:
    """How pictures are encoded. first_stage: the autoencoder's folder. size: side of the pictures in pixels. mirrors:
    whether the mirrored picture is encoded too. dtype: of the moments. block: pictures encoded together. scaling: as
    `data.scaling`.
    """

    first_stage: str
    size: int
    mirrors: bool = False
    dtype: str = "float32"
    precision: str = "fp32"
    block: int = 1
    scaling: str = "bicubic"

    def checked(self, source: Manifest) -> dict:
        """All that decides the cache's bytes, as plain data. Raises UserError for what cannot be."""
        if self.dtype not in ("float32", "float16"):
            raise UserError(f"--dtype {self.dtype} is neither float32 nor float16")
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"--precision {self.precision} is neither fp32 nor bf16; autoencoders overflow in fp16")
        if self.scaling not in ("bicubic", "adm"):
            raise UserError(f"--scaling {self.scaling} is neither bicubic nor adm")
        found = described(self.first_stage)
        if self.size % found.downscale:
            raise UserError(f"--size {self.size} does not divide by {found.downscale}, as {self.first_stage} needs")
        if found.in_channels not in (1, 3):
            raise UserError(f"{self.first_stage} encodes pictures of {found.in_channels} channels; take one of 1 or 3")
        if not set(IMAGE_FIELDS) & set(source.fields):
            raise UserError(f"{source.path} has fields {', '.join(source.fields)}, none of them a picture to encode")
        side = self.size // found.downscale
        return {
            "source": source.hash,
            **encoder(self.first_stage, self.precision, self.block),
            "size": self.size,
            "channels": found.in_channels,
            "crop": "centre",
            "scaling": self.scaling,
            "exif": "apply",
            "range": RANGE,
            "dtype": self.dtype,
            "mirrors": 2 if self.mirrors else 1,
            "shape": [found.channels, side, side],
        }


def encode(
    shards: str, destination: str, request: Request, statistics_only: bool = False, on_progress=lambda done, of: None
) -> str:
    """Encode a data set into the folder `destination`, or its statistics alone into that file; a line that says what.

    shards: a folder with a manifest.json, or the manifest. on_progress: called with the pictures that this rank has
    done, and of how many. A destination that an equal request made is kept, any other that holds something refused. Of
    a call that was killed, the whole shards are kept by the next. A collective; raises UserError.
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
    if distributed.on_rank_0(_is_there, target, asked, statistics_only):
        return f"{target}: keeping what is there, which the same request made"
    if distributed.rank() == 0 and (scaling := survey(source, source.place).scaling(request.size)):
        logging.getLogger(__name__).warning("%s", scaling)
    folder = target.with_name(f".{target.name}.partial")
    with _unfinished(folder, asked):
        work = _Work(source, request, folder, statistics_only)
        distributed.agree(work.do, on_progress)
        statistics = distributed.on_rank_0(_finish, work, asked, target)
    scale = ", ".join(f"{m:.3g} ± {d:.3g}" for m, d in zip(*statistics, strict=True))
    what = "statistics" if statistics_only else "latents"
    return f"{target}: {what} of {source.samples:,} pictures, {asked['shape']} each; channels {scale}"


class _Work:
    """This rank's shards, one after the other."""

    def __init__(self, source: Manifest, request: Request, folder: Path, statistics_only: bool):
        self._source, self._request = source, request
        self._folder, self.statistics_only = folder, statistics_only
        self._ends = np.cumsum(source.shard_sizes).tolist()
        channels = described(request.first_stage).in_channels
        self._picture = Picture("image", request.size, channels)
        self._view = View(Crop(request.size, request.scaling))
        self._copied = [field for field in source.fields if field not in IMAGE_FIELDS]
        self._device = distributed.device()

    @property
    def source(self) -> Manifest:
        return self._source

    def shard(self, number: int) -> Path:
        return self._folder / f"latents-{number:06d}.tar"

    def note(self, number: int) -> Path:
        """The statistics of a shard, written before the shard has its name."""
        return self._folder / f"latents-{number:06d}.json"

    def do(self, on_progress) -> None:
        rank, world_size = distributed.rank(), distributed.world_size()
        mine = range(rank, len(self._ends), world_size)
        sizes = [self._source.shards[number].samples for number in mine]
        todo = [number for number in mine if not self._is_whole(number)]
        done = sum(sizes) - sum(self._source.shards[number].samples for number in todo)
        on_progress(done, sum(sizes))
        if not todo:
            return
        autoencoder = load(self._request.first_stage, self._request.precision, self._device)
        reader = ShardReader(self._source, self._source.place, BlockCache(None, 16 << 30))
        threads = max(1, len(os.sched_getaffinity(0)) // distributed.local_world_size())
        with ThreadPoolExecutor(threads) as pool:
            for number in todo:
                try:
                    self._encode(
                        number, autoencoder, reader, pool, lambda n, done=done: on_progress(done + n, sum(sizes))
                    )
                except OSError as e:
                    raise UserError(f"cannot write {self._folder}: {e.strerror}; name a place with room") from None
                done += self._source.shards[number].samples

    def statistics(self) -> ChannelStatistics:
        """Of all shards, merged in their order."""
        return reduce(add, (ChannelStatistics.of_plain(read_json(self.note(n))) for n in range(len(self._ends))))

    def _is_whole(self, number: int) -> bool:
        try:
            ChannelStatistics.of_plain(read_json(self.note(number)))
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return self.statistics_only or self.shard(number).exists()

    def _encode(self, number: int, autoencoder: Autoencoder, reader: ShardReader, pool, on_sample) -> None:
        from webdataset import TarWriter

        statistics, samples = None, range(self._ends[number] - self._source.shards[number].samples, self._ends[number])
        temporary = self.shard(number).with_suffix(".tar.tmp")
        with open(os.devnull if self.statistics_only else temporary, "wb") as file:
            with TarWriter(file, mtime=0, encoder=False) as writer:
                for sample, others, moments in self._moments(samples, autoencoder, reader, pool):
                    found = ChannelStatistics.of(moments)
                    statistics = found if statistics is None else statistics + found
                    fields = others | {MOMENTS_FIELD: self._stored(moments, reader, sample)}
                    writer.write({"__key__": f"{sample:08d}"} | fields)
                    on_sample(sample + 1 - samples.start)
            if not self.statistics_only:
                file.flush()
                os.fsync(file.fileno())
        with replacing(self.note(number)) as note:
            note.write(json.dumps(statistics.as_plain()).encode())
        if not self.statistics_only:
            os.replace(temporary, self.shard(number))

    def _moments(
        self, samples: range, autoencoder: Autoencoder, reader: ShardReader, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, dict[str, bytes], np.ndarray]]:
        """(sample, its other files, moments float32 (mirrors, 2, C, h, w)) of each; pictures are decoded a piece ahead.

        Blocks begin with the shard, so that they are the same at any number of ranks.
        """
        block = self._request.block
        size = block * -(-PIECE // block)
        pieces = (samples[first : first + size] for first in range(0, len(samples), size))
        begun = self._begun(next(pieces), reader, pool)
        while begun is not None:
            piece, files, pictures = begun
            pixels = torch.from_numpy(np.stack(list(pictures)))
            following = next(pieces, None)
            begun = None if following is None else self._begun(following, reader, pool)
            for first in range(0, len(piece), block):
                rows = pixels[first : first + block].to(self._device)
                looks = [rows, rows.flip(-1)] if self._request.mirrors else [rows]
                found = torch.stack([autoencoder.moments(normalize(look), block) for look in looks], 1).cpu().numpy()
                for row, moments in enumerate(found, first):
                    if not np.isfinite(moments).all():
                        raise BadSample(
                            f"{reader.name(piece[row])}: the first stage gives no finite latent of it; take "
                            "--precision fp32, or pack the shards without it"
                        )
                    yield piece[row], {name: files[row][name] for name in self._copied if name in files[row]}, moments

    def _begun(self, piece: range, reader: ShardReader, pool: ThreadPoolExecutor):
        """(the samples, their files, what gives their pictures uint8 (C, S, S) in order)."""
        wanted = (*IMAGE_FIELDS, *self._copied)
        reader.prefetch(piece, wanted)
        files = [reader.read(sample, wanted) for sample in piece]
        decoded = pool.map(
            lambda one: read_field(reader, *one, self._picture, self._view), zip(piece, files, strict=True)
        )
        return piece, files, decoded

    def _stored(self, moments: np.ndarray, reader: ShardReader, sample: int) -> bytes:
        """A .npy file. Raises BadSample where the dtype cannot hold them."""
        with np.errstate(over="ignore"):
            kept = moments.astype(self._request.dtype)
        if not np.isfinite(kept).all():
            raise BadSample(f"{reader.name(sample)}: float16 cannot hold its latent; take --dtype float32")
        file = io.BytesIO()
        np.lib.format.write_array(file, kept, version=(1, 0))
        return file.getvalue()


def _finish(work: _Work, asked: dict, target: Path) -> tuple[list[float], list[float]]:
    """On rank 0, once all shards are whole: the manifest, or the file of statistics. (means, deviations)."""
    found = work.statistics()
    mean, deviation = found.mean.tolist(), found.deviation.tolist()
    if not all(value > 0 for value in deviation):
        raise UserError(
            f"channel {deviation.index(min(deviation))} of the latents is the same everywhere; it cannot be scaled"
        )
    latents = Latents(**asked, mean=mean, deviation=deviation)
    folder = work.shard(0).parent
    try:
        if work.statistics_only:
            with replacing(target) as file:
                file.write(json.dumps({"format": 1, "latents": latents.model_dump()}, indent=1).encode() + b"\n")
            shutil.rmtree(folder, ignore_errors=True)
            return mean, deviation
        shards = [work.shard(number) for number in range(len(work.source.shards))]
        index_shards(shards, folder / "manifest.json", classes=work.source.classes, latents=latents)
        # With what `replacing` left where it was killed.
        for left in (*folder.glob("*.json"), *folder.glob(".*.tmp"), *folder.glob("*.tar.tmp"), folder / _LOCK):
            if left.name not in (REQUEST, "manifest.json"):
                left.unlink(missing_ok=True)
        os.rename(folder, target)
    except OSError as e:
        raise UserError(f"cannot write {target}: {e.strerror}; name a place with room") from None
    return mean, deviation


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
        differing = [key for key in asked if before.get(key) != asked[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{target} exists and was not made by `dtrain encode`; {other}") from None
    if differing:
        key = differing[0]
        raise UserError(
            f"{target} was made with {key} {str(before.get(key))[:20]}, not {str(asked[key])[:20]}; {other}"
        )
    if not statistics_only:
        manifests.check_shards(manifests.load(target / "manifest.json"), target)
    return True


@contextmanager
def _unfinished(folder: Path, asked: dict) -> Iterator[None]:
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
