"""Small shards for the tests, written by webdataset itself, and the folders and configurations around them."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import ShardWriter

from dtrain.config import Config, validate
from dtrain.data.shards.indexing import index_shards
from dtrain.data.shards.manifest import Manifest, load
from dtrain.data.shards.reader import ShardReader

# More than ustar's 100 bytes of name, and a component over its limit.
LONG_NAME = "n" * 70 + "/" + "m" * 130


def picture(number: int, size: int = 8, channels: int = 3, form: str = "PNG") -> bytes:
    """A noise image that depends on its number."""
    levels = np.random.default_rng(number).integers(0, 256, (size, size, channels), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels[:, :, 0] if channels == 1 else levels).save(file, form)
    return file.getvalue()


def labelled_pictures(count: int, classes: int = 3, channels: int = 3, size: int = 8) -> list[dict]:
    return [{"png": picture(i, size, channels), "cls": str(i % classes).encode()} for i in range(count)]


def write_shards(folder: Path, samples: list[dict], shard_samples: int = 10) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / "train-%06d.tar")
    with ShardWriter(pattern, maxcount=shard_samples, verbose=0, mtime=0, encoder=False) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:06d}"} | sample)
    return sorted(folder.glob("*.tar"))


def write_tar(path, members: list[tuple[str, bytes]], form=tarfile.PAX_FORMAT, pax_headers=None):
    """A tar with these members, written by Python's tarfile."""
    with tarfile.open(path, "w", format=form, pax_headers=pax_headers) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def data_set(folder: Path, samples: list[dict], shard_samples: int = 10) -> Manifest:
    return index_shards(write_shards(folder, samples, shard_samples), folder / "manifest.json")


def samples_of(folder) -> list[dict[str, bytes]]:
    """Field → bytes, of every sample of the data set in the folder."""
    manifest = load(folder / "manifest.json")
    reader = ShardReader(manifest, folder)
    return [reader.read(i) for i in range(manifest.samples)]


def rewrite_side(folder: Path, table: np.ndarray) -> None:
    """Replace the side file by one of these members, and its hash in the manifest."""
    document = json.loads((folder / "manifest.json").read_bytes())
    document["members"]["sha256"] = hashlib.sha256(table.tobytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(document))
    (folder / "manifest.members").write_bytes(table.tobytes())


def configuration(folder: Path, batch_size: int = 8, num_classes: int = 3, generator: int = 2, **data) -> Config:
    tree = {
        "run": {"name": "test", "seed": 5, "generator": generator},
        "data": {"shards": str(folder), "image_size": 8, "batch_size": batch_size} | data,
        "model": {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 2, "num_classes": num_classes},
        "train": {"steps": 1},
    }
    return validate(tree, "a test")


def short_run(folder, steps, batch_size=8, **data) -> dict:
    """A config as plain data: `steps` steps on the shards in `folder`/data, damaged samples replaced by others."""
    return {
        "run": {"name": "run", "dir": str(folder / "runs"), "seed": 5},
        "data": {"shards": str(folder / "data"), "image_size": 8, "batch_size": batch_size, "workers": 0}
        | {"streams": 2, "shuffle_window": 9, "on_error": "replace"}
        | data,
        "model": {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 4, "num_classes": 3},
        "train": {"steps": steps, "log_every": 1, "checkpoint_every": 1000},
        "deepspeed": {"zero_stage": 0},
        "tracking": {"enabled": False},
    }
