"""From a file's bytes to pixels of the model's size and range, and back to bytes.

One policy for images: a still picture of 8 bits a channel becomes what Pillow's `convert("RGB")`, or `convert("L")`,
makes of it: palettes are looked up, CMYK is converted, transparency is dropped. All else is refused by name.
"""

import io
import re
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode

from dtrain.errors import BadSample

MAX_PIXELS = 1 << 26  # 67 megapixels, 200 MB: a header may promise more than memory holds

_MODES = {1: ImageReadMode.GRAY.value, 3: ImageReadMode.RGB.value}
_JPEG, _PNG, _RIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"
_STANDALONE = frozenset([0x01, *range(0xD0, 0xD9)])  # markers without a segment
_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame


def decode(data: bytes, channels: int) -> torch.Tensor:
    """Decode a JPEG, PNG or WebP to uint8 (channels, H, W); 1 channel is grey, 3 are RGB.

    Raises BadSample that says what is wrong with the image; which image it was is known to the caller. The size is
    read from the header first, so that no image takes more memory than MAX_PIXELS.
    """
    width, height = _size(data)
    if not 0 < width * height <= MAX_PIXELS:
        raise BadSample(f"has {width} × {height} pixels; between 1 and {MAX_PIXELS:,} can be used")
    if data.startswith(_PNG):
        return _decode_png(data, channels)
    # WebP has no grey of its own.
    mode = _MODES[3] if data[:4] == _RIFF else _MODES[channels]
    try:
        # A copy, because torch warns of buffers it may not write to.
        # The operator itself: torchvision's wrapper costs a quarter of a small picture's decoding.
        image = torch.ops.image.decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode, False)
    except RuntimeError as e:
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(e).splitlines()[0]).rstrip(".")
        raise BadSample(f"cannot be decoded ({reason})") from None
    if image.shape[0] != channels:
        image = torch.from_numpy(np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")))[None]
    return image


def _decode_png(data: bytes, channels: int) -> torch.Tensor:
    """By Pillow: torchvision 0.29's PNG decoder crashes the process on many damaged files."""
    if data[24:25] == b"\x10":
        raise BadSample("has 16 bits a channel, not 8")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise BadSample(f"cannot be decoded ({reason})") from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()


def _size(data: bytes) -> tuple[int, int]:
    """(width, height) as the header says that the decoder will go by.

    Raises BadSample for what is not a still image in one of the three formats, or has no size where it must stand: a
    decoder may find one further on, and take as much memory as that says.
    """
    if data.startswith(_JPEG):
        size = _jpeg_size(data)
    elif data.startswith(_PNG):
        size = _png_size(data)
    elif data.startswith(_RIFF) and data[8:12] == b"WEBP":
        size = _webp_size(data)
    else:
        raise BadSample("is not a JPEG, PNG or WebP image")
    if size is None:
        raise BadSample("cannot be decoded (its header is damaged or cut off)")
    return size


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Of the first frame. Between segments libjpeg passes over whatever is no marker, and so does this."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 9 <= len(data):
        marker = data[at + 1]
        if marker in _FRAME:
            return data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0 or marker in _STANDALONE:
            at += 2
        else:
            at += 2 + max(2, data[at + 2] << 8 | data[at + 3])
    return None


def _png_size(data: bytes) -> tuple[int, int] | None:
    """Of the one header, which must be the first chunk: Pillow goes by the last one before the pixels."""
    if data[12:16] != b"IHDR" or len(data) < 24:
        return None
    at = 8
    while at + 8 <= len(data) and (kind := data[at + 4 : at + 8]) != b"IDAT":
        if kind == b"acTL":
            raise BadSample("is animated; only still images can be used")
        if kind == b"IHDR" and at > 8:
            return None
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    if len(data) < 30:
        return None
    form = data[12:16]
    if form == b"VP8X":
        if data[20] & 2:
            raise BadSample("is animated; only still images can be used")
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if form == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if form == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def centre_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Scale the shorter side to `size` and cut out the centre: uint8 (C, H, W) to (C, size, size).

    As in ADM (Dhariwal & Nichol 2021): halved by averaging while twice too large, then one bicubic step, so that large
    photographs do not alias.
    """
    if image.shape[1:] == (size, size):
        return image
    picture = _scaled(image, size)
    return _cut(picture, (picture.width - size) // 2, (picture.height - size) // 2, size)


def random_crop(image: torch.Tensor, size: int, draws: Sequence[float]) -> torch.Tensor:
    """A square of 4/5 to all of the shorter side, from anywhere, scaled to `size`: ADM's random crop.

    draws: three numbers in [0, 1), for scale, left and top, so that the crop is a function of its image's key.
    """
    scaled = size + int(draws[0] * (size // 4 + 1))  # the shorter side, from size to size · 5/4
    picture = _scaled(image, scaled)
    left, top = (int(u * (side - size + 1)) for u, side in zip(draws[1:], picture.size, strict=True))
    return _cut(picture, left, top, size)


def _scaled(image: torch.Tensor, shorter: int) -> Image.Image:
    """Halved by averaging while twice too large, then bicubic, until the shorter side is as asked."""
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    while min(picture.size) >= 2 * shorter:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = shorter / min(picture.size)
    if max(picture.size) * scale * shorter > MAX_PIXELS:
        raise BadSample(f"has {image.shape[2]} × {image.shape[1]} pixels, too long a strip to scale")
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def _cut(picture: Image.Image, left: int, top: int, size: int) -> torch.Tensor:
    pixels = np.array(picture.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1).contiguous()


def normalize(image: torch.Tensor) -> torch.Tensor:
    """uint8 levels to float32 in [−1, 1]."""
    # In place: fresh pages for two more copies would cost more than the arithmetic.
    return image.to(torch.float32, copy=True).div_(127.5).sub_(1)


def quantize(image: torch.Tensor) -> torch.Tensor:
    """Floats, [−1, 1] and whatever lies outside, to the nearest uint8 level; the inverse of `normalize`."""
    return ((image.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
