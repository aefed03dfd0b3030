"""Whether data.exif and data.scaling matter to a split: whether any of its pictures is turned, or scaled."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain

from dtrain.data.fields.exif import AS_STORED
from dtrain.data.fields.headers import Header, header
from dtrain.data.shards.cache import BlockCache, default_directory
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.sample_files import IMAGE_FIELDS
from dtrain.errors import BadSample
from dtrain.files import replacing

_READ = 512  # samples fetched at a time of a remote split
_LONG = 1.0  # seconds after which the answer is kept on this machine


def any_turned(manifest: Manifest, directory: str, cache: BlockCache | None = None) -> bool:
    """Whether a picture of a split says by its EXIF data that it is to be turned."""
    return _any(manifest, directory, cache, "turned", lambda found: found.orientation != AS_STORED)


def any_scaled(manifest: Manifest, directory: str, image_size: int, cache: BlockCache | None = None) -> bool:
    """Whether a picture of a split has another shorter side than `image_size`: others are only cut."""
    name = f"scaled-{image_size}"
    return _any(manifest, directory, cache, name, lambda found: min(found.width, found.height) != image_size)


def _any(
    manifest: Manifest, directory: str, cache: BlockCache | None, name: str, applies: Callable[[Header], bool]
) -> bool:
    """Reads headers of a split's pictures until one is found. A damaged one is passed over: whoever uses it names it.

    The answer belongs to the manifest's hash. Where it took long it is kept in ~/.cache/dtrain, but not that none is
    where some could not be read: they may be restored.
    """
    kept = default_directory() / f"{name}-{manifest.hash[:32]}"
    with suppress(OSError, ValueError):
        return json.loads(kept.read_bytes()) is True
    started, reader = time.perf_counter(), ShardReader(manifest, directory, cache)
    starts = range(0, manifest.samples, _READ)
    found, whole = False, True
    for one in chain.from_iterable(_headers(reader, first, manifest.samples) for first in starts):
        whole = whole and one is not None
        if one is not None and applies(one):
            found = True
            break
    if (found or whole) and time.perf_counter() - started > _LONG:
        with suppress(OSError):  # a home that cannot be written costs time and nothing else
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as file:
                file.write(json.dumps(found).encode())
    return found


def _headers(reader: ShardReader, first: int, samples: int) -> Iterator[Header | None]:
    """The header of each sample of a block that begins at `first`; None for a damaged one."""
    block = range(first, min(first + _READ, samples))
    reader.prefetch(block, IMAGE_FIELDS)
    for sample in block:
        try:
            data = next(iter(reader.read(sample, IMAGE_FIELDS).values()), b"")
            yield header(data)
        except BadSample:
            yield None
