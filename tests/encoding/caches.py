"""Pictures with several captions each, and caches of their words, made on forked ranks."""

import json
import os
import signal
import time
from pathlib import Path

from tests.data.shard_files import data_set, labelled_pictures
from tests.ranks import run_ranks, start_ranks

COUNT, LENGTH = 42, 8
SAID = ["the digit three left of the digit seven", "a nine", "two of the four", "the one digit left of a nine of two"]


def captions(number: int) -> list[str | None]:
    """Of picture `number`: none, one, or several, some of them longer than LENGTH tokens with the marks around them."""
    return [None, *SAID][: number % 5 + 1] if number % 3 else SAID[number % 4 :][:1]


def captioned(folder: Path, count: int = COUNT, first: int = 0) -> Path:
    """Grey noise of 8 × 8, in shards of 7: the first caption in .txt, all in .json."""
    samples = labelled_pictures(first + count, channels=1)[first:]
    for number, sample in enumerate(samples):
        sample |= {"txt": (captions(number)[-1] or "").encode(), "json": json.dumps({"en": captions(number)}).encode()}
    data_set(folder, samples, 7)
    return folder


def encoded(shards, destination, folder, world_size=1, **request) -> str:
    """What rank 0 says of `dtrain encode` on so many ranks."""
    return run_ranks(encode, world_size, shards, destination, folder, request)[0]


def encode(shards, destination, folder, request=(), kill_at=None, first_stage=None):
    from dtrain.encoding.captions import CaptionRequest
    from dtrain.encoding.encode import Request
    from dtrain.encoding.encode import encode as run
    from dtrain.encoding.pictures import PictureRequest

    def on_progress(done, of):
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    words = CaptionRequest(str(folder), **{"field": "json:en", "length": LENGTH, **dict(request)})
    latents = first_stage and PictureRequest(str(first_stage), 8, True)
    return run(str(shards), str(destination), Request(latents, words), on_progress)


def killed(shards, destination, folder, world_size, kill_at, **request) -> None:
    """`encode` of which each rank is killed at its sample `kill_at`."""
    started = start_ranks(encode, world_size, shards, destination, folder, request, kill_at)
    for process, _ in started:
        process.join(60)
        assert process.exitcode == -signal.SIGKILL


def killed_after(seconds, shards, destination, folder, world_size, **request) -> bool:
    """`encode` whose ranks are killed so many seconds after their start. False where one had already ended."""
    started = start_ranks(encode, world_size, shards, destination, folder, request)
    time.sleep(seconds)
    for process, _ in started:
        process.kill()
    for process, _ in started:
        process.join(60)
    return all(process.exitcode == -signal.SIGKILL for process, _ in started)
