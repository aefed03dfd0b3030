"""What disks do to files: bits that flip, files that are cut, deleted, or older than they should be."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtrain.config import Data
from dtrain.data.order.mixture import of_run
from dtrain.data.shards.manifest import load_all

DAMAGES = ("a flipped bit", "a truncated file", "a missing file", "a flipped bit in the manifest", "an exchanged file")


@dataclass(frozen=True)
class Damage:
    kind: str  # of DAMAGES
    seed: int

    def do(self, checkpoint: Path) -> str:
        """Damage one file of a complete checkpoint; returns its name, and where."""
        rng = np.random.default_rng(self.seed)
        files = sorted(p for p in checkpoint.iterdir())
        if self.kind == "a flipped bit in the manifest":
            victim = checkpoint / "manifest.json"
        elif self.kind == "an exchanged file":
            victim = next(p for p in files if p.suffix == ".safetensors")
        else:
            victim = files[rng.integers(len(files))]
        data = bytearray(victim.read_bytes())
        if self.kind == "a missing file":
            victim.unlink()
            return victim.name
        if self.kind == "a truncated file":
            at = int(rng.integers(len(data)))
            os.truncate(victim, at)
            return f"{victim.name} after {at:,} bytes"
        if self.kind == "an exchanged file":  # the same length, the bytes of another place
            victim.write_bytes(data[: len(data) // 2] + data[len(data) // 2 :][::-1])
            return victim.name
        at = int(rng.integers(len(data)))
        data[at] ^= 1 << int(rng.integers(8))
        victim.write_bytes(data)
        return f"{victim.name}, byte {at:,}"


def damage_shard(data: Data, seed: int, image: int, folder: Path) -> str:
    """Make `folder` the data set of links to the shards, but for one whose bytes are all inverted: that of `image`.

    seed: of the run. image: of its order. Returns the shard's name. The shards themselves are not touched.
    """
    manifest = load_all(data)
    _, samples = of_run(data, seed, manifest).samples(np.array([image]))
    number = int(np.searchsorted(np.cumsum(manifest.shard_sizes), samples[0], side="right"))
    name = manifest.shards[number].name
    source = Path(data.shards).resolve()
    folder.mkdir(exist_ok=True)
    for path in [*source.iterdir(), Path(data.manifest or source / "manifest.json").resolve()]:
        link = folder / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    (folder / name).unlink()
    (folder / name).write_bytes(bytes(255 - b for b in (source / name).read_bytes()))
    return name
