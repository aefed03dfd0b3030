"""Pictures that a user names, as files, folders or an array: cropped as the held-out ones of a run."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dtrain.config import Data
from dtrain.data.fields.picture import Crop
from dtrain.data.pack.walk import walk
from dtrain.errors import BadSample, UserError
from dtrain.files import read_bytes

MOST_PICTURE_BYTES = 1 << 30


def picture_files(places: Iterable[str | Path]) -> list[Path]:
    """Files as they are named, and of a folder all pictures below it, sorted by name. Raises UserError for none."""
    found: list[Path] = []
    for place in map(Path, places):
        if not place.is_dir():
            found.append(place)
            continue
        inside = [place / name for name, _ in walk(place).pictures]
        if not inside:
            raise UserError(f"{place} holds no .jpg, .jpeg, .png or .webp files; name another folder")
        found += inside
    if not found:
        raise UserError("there are no pictures; name files or a folder")
    return found


def read_pictures(files: list[Path], data: Data) -> Tensor:
    """uint8 (n, C, H, W), turned, scaled and cropped as held-out pictures of the run are. Raises UserError."""
    images, crop = [], Crop(data.image_size, data.scaling)
    for path in files:
        try:
            images.append(crop.of(read_bytes(path, MOST_PICTURE_BYTES), data.channels, data.upright))
        except OSError as e:
            raise UserError(f"cannot read the picture {path}: {e.strerror}") from None
        except BadSample as e:
            raise UserError(f"the picture {path} {e}; convert it, or leave it out") from None
    return torch.stack(images)


def as_pictures(images: np.ndarray, data: Data) -> Tensor:
    """uint8 (n, C, H, W) of uint8 (n, H, W, C), scaled and cropped likewise. Raises UserError for another array."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != data.channels or not images.size:
        got = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"pictures in an array are uint8 (n, height, width, {data.channels}), not {got}")
    pictures = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    crop = Crop(data.image_size, data.scaling)
    return torch.stack([crop(picture) for picture in pictures])
