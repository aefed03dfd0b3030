"""How fast pictures come out of shards, beside webdataset with Pillow and DiT's centre crop in the same run.

    python benchmarks/pictures.py [--repetitions 9] [--seconds-per-run 0.5]

Photographs are made by a seed: noise with a photograph's spectrum (amplitude falls as 1/f^1.7), discs with hard edges,
then JPEG by Pillow with 4:2:0 chroma. Three sets: 32 × 32 (quality 95), 256 × 256 (quality 90), and 500 × 375
(quality 93) made into 256 × 256. Both sides give uint8 pictures and class numbers, one process, one thread, shards on
the local disk; floats and what is drawn (t, noise, flips) are made on a batch's device and are not here.
They take turns; seconds are the process's own; ratios are of medians. Another load on the machine counts in them,
too, so rates are bounded by the repetition that was disturbed least, ours / theirs by the medians.
"former" is ADM's scaling with torchvision's decoder, as runs from before data.scaling were fed.
Exit code 1 where a bound is missed.
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from dtrain.config import validate
from dtrain.data.fields import jpeg
from dtrain.data.shards.indexing import index
from dtrain.data.stream import StepDataset
from dtrain.distributed import keep_freed_memory

BATCH = 50
COUNT = 500  # of a set
SETS = {  # name → width, height, quality, size to be trained on
    "32 × 32": (32, 32, 95, 32),
    "256 × 256": (256, 256, 90, 256),
    "500 × 375 → 256": (500, 375, 93, 256),
}
LEAST = {"256 × 256": 3000, "500 × 375 → 256": 800}  # pictures per second of a core


def photograph(width: int, height: int, quality: int, rng: np.random.Generator) -> bytes:
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.maximum(np.hypot(rows, columns), 1 / max(width, height))
    waves = rng.standard_normal((3, *frequency.shape)) + 1j * rng.standard_normal((3, *frequency.shape))
    waves[1:] = 0.9 * waves[:1] + 0.2 * waves[1:]  # colours go together
    levels = np.fft.irfft2(waves / frequency**1.7, s=(height, width))
    levels = 120 + 45 * (levels - levels.mean()) / levels.std()
    y, x = np.mgrid[:height, :width]
    for _ in range(12):
        inside = np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height)) < rng.uniform(0.03, 0.2) * width
        levels[:, inside] += rng.uniform(-60, 60, (3, 1))
    file, pixels = io.BytesIO(), levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def write(folder: Path, width: int, height: int, quality: int) -> float:
    """Shards of COUNT photographs with class numbers; their mean size in kB."""
    rng, size = np.random.default_rng(0), 0
    with webdataset.ShardWriter(str(folder / "%04d.tar"), maxcount=COUNT // 2, verbose=0) as shards:
        for number in range(COUNT):
            data = photograph(width, height, quality, rng)
            shards.write({"__key__": f"{number:05}", "jpg": data, "cls": str(number % 10)})
            size += len(data)
    return size / COUNT / 1000


def dataset_of(folder: Path, size: int, scaling: str) -> StepDataset:
    tree = {
        "run": {"name": "benchmark"},
        "data": {"shards": str(folder), "image_size": size, "batch_size": BATCH, "workers": 0, "scaling": scaling},
        "model": {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 2, "num_classes": 10},
        "train": {"steps": 1},
    }
    return StepDataset(validate(tree, "the benchmark"), index(str(folder), folder / "manifest.json"), 0, 1, 0)


def ours(dataset: StepDataset, former: bool) -> Iterator[int]:
    """Reads without end; gives how many pictures came."""
    library = jpeg._library
    for step in range(sys.maxsize):
        jpeg._library = (lambda: None) if former else library
        dataset.read(step)
        jpeg._library = library
        yield BATCH


def centre_crop(picture: Image.Image, size: int) -> np.ndarray:
    """The crop of DiT's and ADM's training scripts."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), resample=Image.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), resample=Image.BICUBIC)
    pixels = np.array(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def by_webdataset(folder: Path, size: int) -> Iterator[int]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    while True:
        samples = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None).decode("pilrgb")
        pipeline = samples.to_tuple("jpg", "cls").map_tuple(lambda picture: centre_crop(picture, size), int)
        for images, _ in pipeline.batched(BATCH):
            yield len(images)


def rate(pictures: Iterator[int], seconds: float) -> float:
    """Pictures per second of this process's own time."""
    next(pictures)
    done, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        done += next(pictures)
    return done / (time.process_time() - started)


def measured(folder: Path, size: int, options) -> dict[str, list[float]]:
    ways: dict[str, Callable[[], Iterator[int]]] = {
        "now": lambda: ours(dataset_of(folder, size, "bicubic"), former=False),
        "former": lambda: ours(dataset_of(folder, size, "adm"), former=True),
        "webdataset": lambda: by_webdataset(folder, size),
    }
    going = {name: way() for name, way in ways.items()}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repetitions):
        for name, pictures in going.items():
            found[name].append(rate(pictures, options.seconds_per_run))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--seconds-per-run", type=float, default=0.5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a data worker does
    missed = []
    columns = ("kB", 7), ("dtrain", 9), ("best", 9), ("bound", 8), ("former", 9), ("webdataset", 12), ("ratio", 8)
    print(f"{'pictures per second of a core':30}" + "".join(f"{name:>{width}}" for name, width in columns))
    with tempfile.TemporaryDirectory() as place:
        for number, (name, (width, height, quality, size)) in enumerate(SETS.items()):
            folder = Path(place) / str(number)
            folder.mkdir()
            mean = write(folder, width, height, quality)
            found = measured(folder, size, options)
            now, former, peer = (statistics.median(found[way]) for way in ("now", "former", "webdataset"))
            best, least = max(found["now"]), LEAST.get(name, 0)
            row = f"{mean:7.1f}{now:9,.0f}{best:9,.0f}{least or '':>8}{former:9,.0f}{peer:12,.0f}{now / peer:8.1f}"
            print(f"{name:30}{row}", flush=True)
            if best < least or now < peer or now < 0.97 * former:
                missed.append(name)
    load = f"load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores"
    print(f"bounds: the best of dtrain, 1.0 × webdataset, 0.97 × former; missed: {', '.join(missed) or 'none'}; {load}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
