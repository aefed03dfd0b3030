"""From a file's bytes to pixels of the model's size and range, and back to bytes.

One policy for images: a still picture of 8 bits a channel becomes what Pillow's `convert("RGB")`, or `convert("L")`,
makes of it: palettes are looked up, CMYK is converted, transparency is dropped. It is turned and mirrored as its EXIF
orientation says, unless a run has data.exif "ignore". All else is refused by name.
"""

import io
import re
import struct
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from dtrain.data.fields.headers import JPEG, PNG, RIFF, Header, header
from dtrain.data.fields.image_operator import GRAY, RGB, decode_image
from dtrain.data.fields.jpeg import decode_jpeg
from dtrain.errors import BadSample

MAX_PIXELS = 1 << 26  # 67 megapixels, 200 MB: a header may promise more than memory holds
MOST_HALVINGS = 3  # of a JPEG's sides while it is decoded: its blocks are of 8 × 8 pixels
SPARE = 2  # how much larger than the square a reduced JPEG stays: what it lacks is then scaled away

_MODES = {1: GRAY, 3: RGB}
# EXIF orientation → whether rows and columns change places, and which dimensions of (C, H, W) are flipped then.
_TURNS = {2: (False, (2,)), 3: (False, (1, 2)), 4: (False, (1,))}
_TURNS |= {5: (True, ()), 6: (True, (2,)), 7: (True, (1, 2)), 8: (True, (1,))}


def decode(data: bytes, channels: int, upright: bool = True, least: int | None = None) -> torch.Tensor:
    """Decode a JPEG, PNG or WebP to uint8 (channels, H, W); 1 channel is grey, 3 are RGB.

    upright: turned and mirrored as its EXIF orientation says; else the pixels as they are stored.
    least: pixels of the shorter side down to which the sides of a JPEG may be halved; None: it comes in full.
    Raises BadSample that says what is wrong with the image; which image it was is known to the caller. The size is
    read from the header first, so that no image takes more memory than MAX_PIXELS.
    """
    found = header(data)
    if not 0 < found.width * found.height <= MAX_PIXELS:
        raise BadSample(f"has {found.width} × {found.height} pixels; between 1 and {MAX_PIXELS:,} can be used")
    image = _as_stored(data, channels, found, least)
    return _turned(image, found.orientation) if upright and found.orientation in _TURNS else image


def _turned(image: torch.Tensor, orientation: int) -> torch.Tensor:
    transposed, flipped = _TURNS[orientation]
    return (image.transpose(1, 2) if transposed else image).flip(flipped).contiguous()


def _as_stored(data: bytes, channels: int, found: Header, least: int | None) -> torch.Tensor:
    if data.startswith(PNG):
        return _decode_png(data, channels)
    if data.startswith(JPEG) and not found.cmyk:
        pixels = decode_jpeg(data, channels, found.height, found.width, _halvings(found, least))
        if pixels is not None:
            return torch.from_numpy(pixels.transpose(2, 0, 1))
    # WebP has no grey of its own.
    mode = _MODES[3] if data[:4] == RIFF else _MODES[channels]
    try:
        # A copy, because torch warns of buffers it may not write to.
        # The operator itself: torchvision's wrapper costs a quarter of a small picture's decoding.
        image = decode_image()(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode, False)
    except RuntimeError as e:
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(e).splitlines()[0]).rstrip(".")
        raise BadSample(f"cannot be decoded ({reason})") from None
    if image.shape[0] != channels:
        image = torch.from_numpy(np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")))[None]
    return image


def _halvings(found: Header, least: int | None) -> int:
    shorter = min(found.width, found.height)
    return 0 if least is None else sum(shorter >> n >= least for n in range(1, MOST_HALVINGS + 1))


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


class Crop(NamedTuple):
    """Which square of a picture is looked at, and how it is scaled: uint8 (C, H, W) to (C, size, size).

    scaling: "bicubic" cuts the square out and scales it in one antialiased bicubic step (torch's, on bytes; Keys 1981
    with a = −1/2); a JPEG that is at least 4 times too large is decoded at a half, a quarter or an eighth of its size
    before, down to twice too large. "adm" is `centre_crop` or `random_crop`.
    draws: three numbers in [0, 1), for scale, left and top, of a random crop as ADM's: a square of 4/5 to all of the
    shorter side from anywhere; None: the largest square in the centre.
    """

    size: int
    scaling: Literal["bicubic", "adm"] = "bicubic"
    draws: Sequence[float] | None = None

    def of(self, data: bytes, channels: int, upright: bool = True) -> torch.Tensor:
        """The square of an image file. Raises BadSample as `decode` does."""
        return self(decode(data, channels, upright, self.least))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if self.scaling == "adm":
            return centre_crop(image, self.size) if self.draws is None else random_crop(image, self.size, self.draws)
        channels, height, width = image.shape
        if height == width == self.size and self.draws is None and image.stride(2) == channels:
            return image  # in the layout below already
        if self.draws is None:
            side = min(height, width)
            left, top = (width - side) // 2, (height - side) // 2
        else:
            side = max(1, round(min(height, width) * self.size / self._shorter))
            left, top = (int(u * (one - side + 1)) for u, one in zip(self.draws[1:], (width, height), strict=True))
        square = image[:, top : top + side, left : left + side]
        # Rows of pixels, as a JPEG is decoded: what torch scales fastest, and one layout for the pictures of a batch.
        square = square.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
        if side != self.size:
            square = torch.nn.functional.interpolate(square, (self.size,) * 2, mode="bicubic", antialias=True)
        return square[0]

    @property
    def least(self) -> int | None:
        """Pixels of the shorter side that a JPEG must keep while it is decoded; None: all that it has."""
        return SPARE * self._shorter if self.scaling == "bicubic" else None

    @property
    def _shorter(self) -> int:
        """Pixels of the whole picture's shorter side where the square is `size` wide."""
        return self.size + (0 if self.draws is None else int(self.draws[0] * (self.size // 4 + 1)))


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


def mirror(images: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """(n, C, H, W), left and right exchanged in the rows where mirrored, bool (n,), is true."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def normalize(image: torch.Tensor) -> torch.Tensor:
    """uint8 levels to float32 in [−1, 1], the same bits on every device."""
    if image.device.type != "cpu":
        return looked_up(image)  # a GPU divides by multiplying with a rounded reciprocal
    # In place: fresh pages for two more copies would cost more than the arithmetic.
    return image.to(torch.float32, copy=True).div_(127.5).sub_(1)


def looked_up(image: torch.Tensor) -> torch.Tensor:
    """What `normalize` computes on a CPU, out of a table of the 256 levels."""
    return _levels(image.device).index_select(0, image.flatten().int()).view(image.shape)


@cache
def _levels(device: torch.device) -> torch.Tensor:
    return normalize(torch.arange(256, dtype=torch.uint8)).to(device)


def quantize(image: torch.Tensor) -> torch.Tensor:
    """Floats, [−1, 1] and whatever lies outside, to the nearest uint8 level; the inverse of `normalize`."""
    return ((image.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
