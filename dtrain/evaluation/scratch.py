"""Samples of an evaluation that is not finished: whole blocks on disk, so that a killed one goes on where it was.

RUN/evaluations/<fingerprint>/block-000000000250-250.npy holds the images of 250 ids from 250 on, uint8 (n, C, H, W).
The fingerprint stands for all that determines an image, so another evaluation never finds them; the same one does,
with any number of samples, metrics or ranks. Images and not features are kept: they serve every extractor.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.data.fields.npy import read_array
from dtrain.errors import BadSample
from dtrain.files import read_bytes, replacing

TRIES = 5


class Scratch:
    def __init__(self, folder: Path, settings: dict[str, Any]):
        """`folder` is the run's; `settings`, all that determines an image, are plain data."""
        content = json.dumps(settings, sort_keys=True)
        self.path = folder / hashlib.sha256(content.encode()).hexdigest()[:16]

    def read(self, start: int, count: int, shape: tuple[int, int, int]) -> Tensor | None:
        """The images of ids start … start + count, uint8 (count, *shape); None where they are not, or not whole."""
        try:
            if self.path.is_symlink():
                return None
            data = read_bytes(self._block(start, count), count * math.prod(shape) + 4096, follow=False)
            return torch.from_numpy(read_array(data, "uint8", [count, *shape]))
        except (OSError, BadSample):
            return None

    def write(self, start: int, images: Tensor) -> None:
        """Keep a block: it is there whole or not at all. Raises OSError."""
        path = self._block(start, len(images))
        if self.path.is_symlink():
            self.path.unlink()  # what lies among evaluations is not followed
        for left in range(TRIES)[::-1]:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as f:
                    np.save(f, images.numpy())
                return
            except (FileNotFoundError, FileExistsError):  # another evaluation removes the folders in this moment
                if not left:
                    raise

    def count(self) -> int:
        """How many images are here."""
        counts = [path.stem.rpartition("-")[2] for path in self.path.glob("block-*.npy")]
        return sum(int(count) for count in counts if count.isascii() and count.isdecimal())

    def remove(self) -> None:
        """Once, when the numbers are out."""
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            self.path.parent.rmdir()
        except OSError:
            return  # another evaluation's blocks are there, or it never was

    def _block(self, start: int, count: int) -> Path:
        return self.path / f"block-{start:012d}-{count}.npy"
