"""What statistics of a split were made from, and what the file is called that holds them.

`reference-<features>-<size>px.npz`, with `-upright` where pictures were turned by their EXIF data, and `-bicubic` where
some were scaled as data.scaling "bicubic" does.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dtrain.data.fields.upright import any_scaled, any_turned
from dtrain.data.shards.cache import BlockCache
from dtrain.data.shards.manifest import Manifest
from dtrain.evaluation.features.build import Extractor

UPRIGHT, BICUBIC = "turned upright, ", ", bicubic"


class Changed(NamedTuple):
    """What a run's data.exif and data.scaling make of a split that other values of them would not.

    upright: some picture was turned by its EXIF data. bicubic: some was scaled, by data.scaling "bicubic". Where they
    make no difference runs of all kinds share what was computed; else each has a file of its own.
    """

    upright: bool = False
    bicubic: bool = False

    @classmethod
    def of(cls, manifest: Manifest, size: int, upright: bool, scaling: str, cache: BlockCache | None) -> "Changed":
        """Reads headers of pictures."""
        bicubic = scaling == "bicubic"
        return cls(
            upright and any_turned(manifest, manifest.place, cache),
            bicubic and any_scaled(manifest, manifest.place, size, cache),
        )

    @classmethod
    def said(cls, text: str) -> "Changed":
        """What a line of `preprocessing` says."""
        return cls(text.startswith(UPRIGHT), BICUBIC in text)


AS_IT_IS = Changed()


def preprocessing(image_size: int, channels: int, changed: Changed = AS_IT_IS) -> str:
    before, after = UPRIGHT if changed.upright else "", BICUBIC if changed.bicubic else ""
    return f"{before}centre crop to {image_size} pixels{after}, {channels} channels"


@dataclass(frozen=True)
class Origin:
    """What statistics were made from."""

    manifest: str  # its path, to see whether it is still the same
    data: str  # the manifest's hash
    extractor: str  # its fingerprint
    preprocessing: str  # what happened to the images before the extractor

    @classmethod
    def of(cls, manifest: Manifest, features: Extractor, image_size: int, channels: int, changed: Changed) -> "Origin":
        path = str(manifest.path.resolve())
        return cls(path, manifest.hash, features.fingerprint, preprocessing(image_size, channels, changed))

    @property
    def fingerprint(self) -> str:
        """A hash of all but the path: data may be moved."""
        content = json.dumps([self.data, self.extractor, self.preprocessing])
        return hashlib.sha256(content.encode()).hexdigest()


def stored_path(directory: Path, features: Extractor, image_size: int, changed: Changed) -> Path:
    """Runs that turn or scale pictures in different ways share a split, and each has a file of its own."""
    how = "".join(f"-{name}" for name, applies in changed._asdict().items() if applies)
    return directory / f"reference-{features.name}-{image_size}px{how}.npz"
