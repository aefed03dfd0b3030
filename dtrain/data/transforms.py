"""From a file's bytes to pixels of the model's size and range, and back to bytes."""

import re

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from dtrain.errors import UserError

_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


def decode(data: bytes, channels: int) -> torch.Tensor:
    """Decode a JPEG or PNG to uint8 (channels, H, W); 1 channel is grey, 3 are RGB.

    Raises UserError that says what is wrong with the image; which image it was is known to the caller.
    """
    if not data.startswith(_MAGIC):
        raise UserError("is neither a JPEG nor a PNG image")
    try:
        # A copy, because torch warns of buffers it may not write to.
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), _MODES[channels])
    except RuntimeError as e:
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(e).splitlines()[0]).rstrip(".")
        raise UserError(f"cannot be decoded ({reason})") from None
    if image.dtype != torch.uint8:
        raise UserError("has 16 bits a channel, not 8")
    return image


def centre_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Scale the shorter side to `size` and cut out the centre: uint8 (C, H, W) to (C, size, size).

    As in ADM (Dhariwal & Nichol 2021): halved by averaging while twice too large, then one bicubic step, so that large
    photographs do not alias.
    """
    if image.shape[1:] == (size, size):
        return image
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    pixels = np.array(picture.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1).contiguous()


def normalize(image: torch.Tensor) -> torch.Tensor:
    """uint8 levels to float32 in [−1, 1]."""
    return image.to(torch.float32) / 127.5 - 1


def quantize(image: torch.Tensor) -> torch.Tensor:
    """Floats, [−1, 1] and whatever lies outside, to the nearest uint8 level; the inverse of `normalize`."""
    return ((image.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
