"""Images a second of each stage of one loader process, and which one limits."""

import time
from collections.abc import Callable

import numpy as np
import torch

from dtrain.config import Config
from dtrain.data.fields.picture import Crop, decode, normalize
from dtrain.data.shards.manifest import check_all, load_all
from dtrain.data.shards.sample_files import IMAGE_FIELDS
from dtrain.data.stream import Completion, StepDataset
from dtrain.errors import UserError
from dtrain.randomness import drawn


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
    data, complete = config.data, Completion(config)
    k = np.arange(min(data.batch_size, 256))
    sources, samples = dataset._order.samples(k)
    places = list(zip(sources.tolist(), samples.tolist(), strict=True))

    def read() -> list[dict[str, bytes]]:
        return [dataset._readers[s].read(n, dataset._samples[s].extensions) for s, n in places]

    files = [next((found[f] for f in IMAGE_FIELDS if f in found), None) for found in read()]
    if None in files:
        raise UserError(f"{data.shards} has samples without an image; `dtrain verify` and pack it again")
    crop = Crop(data.image_size, data.scaling)

    def decoded() -> list[torch.Tensor]:
        return [decode(file, data.channels, data.upright, crop.least) for file in files]

    images = decoded()
    cropped = [crop(image) for image in images]

    def randomness() -> None:
        for draw in dataset._wanted.draws:
            drawn(draw, dataset._draws, k.tolist(), k, 0, len(k))

    each, steps, without_draws = len(k), iter(range(10**9)), iter(range(10**9))
    return {
        "read": _rate(read, each, seconds),
        "decode": _rate(decoded, each, seconds),
        "transform": _rate(lambda: [crop(image).flip(-1) for image in images], each, seconds),
        "randomness": _rate(randomness, each, seconds),
        "collate": _rate(lambda: normalize(torch.stack(cropped)), each, seconds),
        "pictures": _rate(lambda: dataset.read(next(without_draws)), data.batch_size, seconds),
        "whole": _rate(lambda: complete(dataset[next(steps)]), data.batch_size, seconds),
    }


def _rate(stage: Callable[[], object], images: int, seconds: float) -> float:
    stage()
    done, started = 0, time.process_time()
    while (spent := time.process_time() - started) < seconds or not done:
        stage()
        done += images
    return done / max(spent, 1e-9)
