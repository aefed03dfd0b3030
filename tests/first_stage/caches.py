"""Latent caches of a few small pictures, made on forked ranks."""

import hashlib
import os
import signal
import time
from pathlib import Path

from tests.data.shard_files import data_set, labelled_pictures
from tests.ranks import run_ranks, start_ranks

COUNT = 84  # pictures, in shards of 12


def pictures(folder: Path, count: int = COUNT, first: int = 0) -> Path:
    """Grey noise of 8 × 8 with a class, a caption and a further file."""
    samples = labelled_pictures(first + count, channels=1)[first:]
    for number, sample in enumerate(samples):
        sample |= {"txt": f"picture {number}".encode(), "json": b'{"n": %d}' % number}
    data_set(folder, samples, 12)
    return folder


def encoded(shards, destination, source, world_size=1, statistics_only=False, **request) -> str:
    """What rank 0 says of `dtrain encode` on so many ranks."""
    return run_ranks(encode, world_size, shards, destination, source, statistics_only, request)[0]


def encode(shards, destination, source, statistics_only=False, request=(), kill_at=None):
    from dtrain.encoding.encode import Request
    from dtrain.encoding.encode import encode as run
    from dtrain.encoding.pictures import PictureRequest

    def on_progress(done, of):
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    asked = PictureRequest(**{"first_stage": str(source), "size": 8, **dict(request)})
    return run(str(shards), str(destination), Request(asked, None, statistics_only), on_progress)


def killed(shards, destination, source, world_size, kill_at, **request) -> None:
    """`encode` of which each rank is killed at its picture `kill_at`."""
    started = start_ranks(encode, world_size, shards, destination, source, False, request, kill_at)
    for process, _ in started:
        process.join(60)
        assert process.exitcode == -signal.SIGKILL


def killed_after(seconds, shards, destination, source, world_size, statistics_only, **request) -> bool:
    """`encode` whose ranks are killed so many seconds after their start. False where one had already ended."""
    started = start_ranks(encode, world_size, shards, destination, source, statistics_only, request)
    time.sleep(seconds)
    for process, _ in started:
        process.kill()
    for process, _ in started:
        process.join(60)
    return all(process.exitcode == -signal.SIGKILL for process, _ in started)


def content(folder: Path) -> dict[str, str]:
    """File → sha256, of all files of a cache."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
