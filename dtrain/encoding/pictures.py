"""Pictures as the moments of their latents."""

import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod
from operator import add

import numpy as np
import torch

from dtrain.config.autoencoders import described
from dtrain.data.fields.field import Picture, View
from dtrain.data.fields.picture import Crop, normalize
from dtrain.data.fields.samples import read_field
from dtrain.data.shards.latents import RANGE
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.sample_files import IMAGE_FIELDS, MOMENTS_FIELD
from dtrain.errors import BadSample, UserError
from dtrain.first_stage.autoencoder import Autoencoder, load
from dtrain.first_stage.requirements import encoder
from dtrain.first_stage.statistics import ChannelStatistics


@dataclass(frozen=True)
class PictureRequest:
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
        """All that decides the latents' bytes, as plain data. Raises UserError for what cannot be."""
        if self.dtype not in ("float32", "float16"):
            raise UserError(f"--dtype {self.dtype} is neither float32 nor float16, which latents are kept in")
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


class Pictures:
    """What becomes of the pictures of one shard after the other."""

    key, member, reads = "latents", MOMENTS_FIELD, IMAGE_FIELDS

    def __init__(self, request: PictureRequest, device: torch.device):
        self._request, self._device = request, device
        self._picture = Picture("image", request.size, described(request.first_stage).in_channels)
        self._view = View(Crop(request.size, request.scaling))
        self._statistics: ChannelStatistics | None = None

    def start_shard(self) -> None:
        self._statistics = None

    def begin(self, samples: range, files: list[dict[str, bytes]], reader: ShardReader, pool: ThreadPoolExecutor):
        """Decoding goes on in the pool's threads."""
        one = zip(samples, files, strict=True)
        return samples, reader, pool.map(lambda each: read_field(reader, *each, self._picture, self._view), one)

    def made(self, begun) -> Iterator[bytes]:
        """A .npy file of moments (mirrors, 2, C, h, w) of each sample. Raises BadSample."""
        samples, reader, decoded = begun
        pixels, block = torch.from_numpy(np.stack(list(decoded))), self._request.block
        for first in range(0, len(samples), block):
            rows = pixels[first : first + block].to(self._device)
            looks = [rows, rows.flip(-1)] if self._request.mirrors else [rows]
            found = torch.stack([self._autoencoder.moments(normalize(look), block) for look in looks], 1).cpu().numpy()
            for row, moments in enumerate(found, first):
                yield self._stored(moments, reader, samples[row])

    def note(self) -> dict:
        """Statistics of the shard."""
        return self._statistics.as_plain()

    def size(self, source: Manifest) -> tuple[float, str]:
        """(bytes of a sample's member, what to say of them)."""
        asked = self._request.checked(source)
        numbers = asked["mirrors"] * 2 * prod(asked["shape"])
        return 128 + numbers * np.dtype(asked["dtype"]).itemsize, "latents"

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        return load(self._request.first_stage, self._request.precision, self._device)

    def _stored(self, moments: np.ndarray, reader: ShardReader, sample: int) -> bytes:
        """Raises BadSample where they are no numbers, or the dtype cannot hold them."""
        if not np.isfinite(moments).all():
            raise BadSample(
                f"{reader.name(sample)}: the first stage gives no finite latent of it; take --precision fp32, or pack "
                "the shards without it"
            )
        found = ChannelStatistics.of(moments)
        self._statistics = found if self._statistics is None else self._statistics + found
        with np.errstate(over="ignore"):
            kept = moments.astype(self._request.dtype)
        if not np.isfinite(kept).all():
            raise BadSample(f"{reader.name(sample)}: float16 cannot hold its latent; take --dtype float32")
        file = io.BytesIO()
        np.lib.format.write_array(file, kept, version=(1, 0))
        return file.getvalue()


def merged(notes: Iterable[dict]) -> ChannelStatistics:
    """Of all shards, in their order. Raises UserError where a channel cannot be scaled."""
    found = reduce(add, (ChannelStatistics.of_plain(note) for note in notes))
    deviation = found.deviation.tolist()
    if not all(value > 0 for value in deviation):
        raise UserError(
            f"channel {deviation.index(min(deviation))} of the latents is the same everywhere; it cannot be scaled"
        )
    return found
