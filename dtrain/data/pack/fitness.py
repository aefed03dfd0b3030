"""Which pictures a packing takes: those that training can decode, each decoded once, by training's own rule."""

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from PIL import Image

from dtrain.data.fields.headers import JPEG, PNG, RIFF, header
from dtrain.data.pack.left_out import Unfit
from dtrain.data.shards.sample_files import IMAGE_FIELDS
from dtrain.errors import BadSample

# What Pillow raises for a picture that it cannot decode, and `encoded` for one that it does not take.
CANNOT_ENCODE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

FORMATS = {"png": ("png",), "jpeg": ("jpg", "jpeg"), "webp": ("webp",)}

Files = dict[str, bytes]  # of one sample by field; `cls` too where it has a label

# EXIF orientation → what undoes it.
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
_TURNS |= {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE}
_TURNS |= {8: Image.Transpose.ROTATE_90}


def field_of(data: bytes) -> str:
    """jpg, png or webp, by what a file begins with. Raises Unfit for anything else."""
    if data.startswith(JPEG):
        return "jpg"
    if data.startswith(PNG):
        return "png"
    if data.startswith(RIFF) and data[8:12] == b"WEBP":
        return "webp"
    raise Unfit("not JPEG, PNG or WebP inside" if data else "empty file")


def fit(files: Callable[[Any], Files], form: str | None, item: Any) -> Files:
    """`files(item)` where its picture can be trained on, in the format `form` unless that is None.

    Its bytes stay as they are where it has that format. Raises Unfit.
    """
    from dtrain.data.fields.picture import MAX_PIXELS, decode

    sample = files(item)
    field = image_field(sample)
    data = sample[field]
    try:
        if form is not None and field not in FORMATS[form]:
            del sample[field]
            return {FORMATS[form][0]: encoded(data, form, MAX_PIXELS)} | sample
        decode(data, channels=3)
    except (BadSample, *CANNOT_ENCODE) as e:
        raise Unfit(_reason(data, str(e))) from None
    return sample


def image_field(sample: Files) -> str | None:
    return next((f for f in IMAGE_FIELDS if f in sample), None)


def encoded(data: bytes, form: str, max_pixels: int | None = None) -> bytes:
    """A still picture of 8 bits a channel as png, jpeg or webp; the latter two with quality 95.

    Its pixels are turned as its EXIF orientation says, because what is written has no EXIF data any more.
    Raises one of CANNOT_ENCODE.
    """
    file = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        if image.mode[0] in "IF":
            raise ValueError("it has more than 8 bits a channel")
        # A camera's MPO is a JPEG with further pictures behind it, which training does not look at either.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError("it is animated; only still images can be used")
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ValueError(f"it has {image.width} × {image.height} pixels")
        pixels = image if image.mode in ("L", "RGB") else image.convert("RGB")
        with suppress(BadSample):  # Pillow may read what has a header of another kind
            if (turn := _TURNS.get(header(data).orientation)) is not None:  # one of them is 0
                pixels = pixels.transpose(turn)
        pixels.save(file, form.upper(), **({} if form == "png" else {"quality": 95}))
    return file.getvalue()


def _reason(data: bytes, message: str) -> str:
    """A decoder's message in words that are the same for all pictures of its kind, and on all machines."""
    for words, reason in (
        ("animated", "animated"),
        ("16 bits", "more than 8 bits a channel"),
        ("more than 8 bits", "more than 8 bits a channel"),
        (" pixels", "no pixels, or more than 67 million"),
        ("decompression bomb", "no pixels, or more than 67 million"),
        ("truncated", "truncated"),
        ("is not a JPEG", "not JPEG, PNG or WebP inside"),
    ):
        if words in message:
            return reason
    short = data.startswith(RIFF) and len(data) < 8 + int.from_bytes(data[4:8], "little")
    return "truncated" if short or (data.startswith(PNG) and b"IEND" not in data) else "damaged"
