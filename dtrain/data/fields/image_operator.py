"""torchvision's operator that decodes a JPEG or WebP, without torchvision's Python, which takes 2 s to import."""

from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import torch

from dtrain.errors import UserError

GRAY, RGB = 1, 3  # torchvision.io.ImageReadMode


@cache
def decode_image() -> Callable[[torch.Tensor, int, bool], torch.Tensor]:
    """(bytes uint8 (n,), mode, whether EXIF turns it) → uint8 (C, H, W). Raises UserError where it cannot be loaded.

    A program may import torchvision as well, before or after: a library that is loaded is not loaded again.
    """
    spec = find_spec("torchvision")
    if spec is None:
        raise UserError("torchvision is not installed, which decodes JPEG and WebP; install the one that fits torch")
    folder, reason = Path(spec.origin).parent, "there is none"
    for path in sorted(folder.glob("image*")):  # image_stable.so since 0.29, image.so before
        if path.name.endswith(tuple(EXTENSION_SUFFIXES)):
            try:
                torch.ops.load_library(str(path))
                return torch.ops.image.decode_image
            except (OSError, AttributeError) as e:
                reason = str(e.__cause__ or e).splitlines()[0]  # torch names the file alone
    raise UserError(
        f"torchvision's image library in {folder} cannot be loaded ({reason}); install the one that fits torch"
    )
