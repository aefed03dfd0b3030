"""Images a second of each stage of one loader process, and which one limits."""

import time
from collections.abc import Callable

import numpy as np
import torch

from dtrain.config import Config, Data
from dtrain.data.fields.picture import Crop, decode, normalize
from dtrain.data.shards.manifest import check_all, load_all
from dtrain.data.shards.sample_files import IMAGE_FIELDS
from dtrain.data.stream import Completion, StepDataset
from dtrain.errors import UserError
from dtrain.randomness import drawn

STAGES = ("read", "decode", "transform", "randomness", "collate")


def bench(config: Config, seconds: float = 10.0) -> dict[str, float]:
    """Images per second of a core, by stage: read, decode, transform, randomness, collate; `pictures`, batches without
    their random numbers; and `whole`, batches as they are trained on.

    Each stage runs alone on the same images for an equal share of `seconds`, in one process with one thread. Seconds
    are of the process's own time, so that what else runs on the machine counts little.
    """
    manifest = load_all(config.data)
    check_all(manifest, config.data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dataset = StepDataset(config, manifest, 0, 1, 0)
        return _stages(config, dataset, seconds / 7)
    finally:
        torch.set_num_threads(threads)


def report(rates: dict[str, float]) -> str:
    stages = {name: rate for name, rate in rates.items() if name not in ("pictures", "whole")}
    slowest = min(stages, key=stages.get)
    rows = [f"{name:12} {rate:12,.0f} images/s" for name, rate in rates.items()]
    return "\n".join([*rows, f"{slowest} limits: {stages[slowest]:,.0f} images per second of a core"])


def _stages(config: Config, dataset: StepDataset, seconds: float) -> dict[str, float]:
    complete, k = Completion(config), np.arange(min(config.data.batch_size, 256))
    sources, samples = dataset._order.samples(k)
    places = list(zip(sources.tolist(), samples.tolist(), strict=True))

    def read() -> list[dict[str, bytes]]:
        return [dataset._readers[s].read(n, dataset._samples[s].extensions) for s, n in places]

    def randomness() -> None:
        for draw in dataset._wanted.draws:
            drawn(draw, dataset._draws, k.tolist(), k, 0, len(k))

    stages = {"read": read, "randomness": randomness}
    if config.reads_pictures:
        stages |= _of_pictures(config.data, read())
    rates = {name: _rate(stages[name], len(k), seconds) for name in STAGES if name in stages}
    steps, without_draws = iter(range(10**9)), iter(range(10**9))
    batches = {"pictures": lambda: dataset.read(next(without_draws)), "whole": lambda: complete(dataset[next(steps)])}
    return rates | {name: _rate(batch, config.data.batch_size, seconds) for name, batch in batches.items()}


def _of_pictures(data: Data, found: list[dict[str, bytes]]) -> dict[str, Callable[[], object]]:
    """What becomes of these samples' pictures."""
    files = [next((one[f] for f in IMAGE_FIELDS if f in one), None) for one in found]
    if None in files:
        raise UserError(f"{data.shards} has samples without an image; `dtrain verify` and pack it again")
    crop = Crop(data.image_size, data.scaling)

    def decoded() -> list[torch.Tensor]:
        return [decode(file, data.channels, data.upright, crop.least) for file in files]

    images = decoded()
    cropped = [crop(image) for image in images]
    return {
        "decode": decoded,
        "transform": lambda: [crop(image).flip(-1) for image in images],
        "collate": lambda: normalize(torch.stack(cropped)),
    }


def _rate(stage: Callable[[], object], images: int, seconds: float) -> float:
    stage()
    done, started = 0, time.process_time()
    while (spent := time.process_time() - started) < seconds or not done:
        stage()
        done += images
    return done / max(spent, 1e-9)
