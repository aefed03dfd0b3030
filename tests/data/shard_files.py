"""Small shards for the tests, written by webdataset itself, and the folders and configurations around them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import ShardWriter

from dtrain.config import Config, validate
from dtrain.data.shards.indexing import index_shards
from dtrain.data.shards.manifest import Manifest


def picture(number: int, size: int = 8, channels: int = 3, form: str = "PNG") -> bytes:
    """A noise image that depends on its number."""
    levels = np.random.default_rng(number).integers(0, 256, (size, size, channels), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels[:, :, 0] if channels == 1 else levels).save(file, form)
    return file.getvalue()


def write_shards(folder: Path, samples: list[dict], shard_samples: int = 10) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / "train-%06d.tar")
    with ShardWriter(pattern, maxcount=shard_samples, verbose=0, mtime=0, encoder=False) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:06d}"} | sample)
    return sorted(folder.glob("*.tar"))


def labelled_pictures(count: int, classes: int = 3, channels: int = 3, size: int = 8) -> list[dict]:
    return [{"png": picture(i, size, channels), "cls": str(i % classes).encode()} for i in range(count)]


def data_set(folder: Path, samples: list[dict], shard_samples: int = 10) -> Manifest:
    return index_shards(write_shards(folder, samples, shard_samples), folder / "manifest.json")


def configuration(folder: Path, batch_size: int = 8, num_classes: int = 3, seed: int = 5, **data) -> Config:
    tree = {
        "run": {"name": "test", "seed": seed},
        "data": {"shards": str(folder), "image_size": 8, "batch_size": batch_size} | data,
        "model": {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 2, "num_classes": num_classes},
        "train": {"steps": 1},
    }
    return validate(tree, "a test")
