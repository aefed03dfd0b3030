"""Whether any picture of a split says by its EXIF data that it is to be turned: only then data.exif matters to it."""

import json
import time
from contextlib import suppress

from dtrain.data.cache import BlockCache, default_directory
from dtrain.data.exif import AS_STORED
from dtrain.data.fields import IMAGE_FIELDS
from dtrain.data.headers import header
from dtrain.data.manifest import Manifest
from dtrain.data.shards import ShardReader
from dtrain.errors import BadSample
from dtrain.files import replacing

_READ = 512  # samples fetched at a time of a remote split
_LONG = 1.0  # seconds after which the answer is kept on this machine


def any_turned(manifest: Manifest, directory: str, cache: BlockCache | None = None) -> bool:
    """Reads the pictures of a split until one is found. A damaged one is passed over: whoever uses it names it.

    The answer belongs to the manifest's hash. Where it took long it is kept in ~/.cache/dtrain.
    """
    kept = default_directory() / f"turned-{manifest.hash[:32]}"
    with suppress(OSError, ValueError):
        return json.loads(kept.read_bytes()) is True
    started, reader = time.perf_counter(), ShardReader(manifest, directory, cache)
    starts = range(0, manifest.samples, _READ)
    found = any(_turned(reader, first, min(first + _READ, manifest.samples)) for first in starts)
    if time.perf_counter() - started > _LONG:
        with suppress(OSError):  # a home that cannot be written costs time and nothing else
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as file:
                file.write(json.dumps(found).encode())
    return found


def _turned(reader: ShardReader, first: int, end: int) -> bool:
    reader.prefetch(range(first, end), IMAGE_FIELDS)
    for sample in range(first, end):
        with suppress(BadSample):
            data = next(iter(reader.read(sample, IMAGE_FIELDS).values()), b"")
            if header(data).orientation != AS_STORED:
                return True
    return False
