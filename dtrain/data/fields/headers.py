"""What a picture's header says of it: its size, whether it is grey, how it is to be turned. No torch, no NumPy."""

from typing import NamedTuple

from dtrain.data.fields import exif
from dtrain.errors import BadSample

JPEG, PNG, RIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"  # what files begin with; RIFF is WebP's
_STANDALONE = frozenset([0x01, *range(0xD0, 0xD9)])  # markers without a segment
_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame
_APP1 = 0xE1
_GREY = (b"\0", b"\4")  # colour types of PNG, without and with transparency
_EXIF_FLAG, _ANIMATION_FLAG = 8, 2  # of a WebP


class Header(NamedTuple):
    """width and height in pixels, as stored. grey: the file has one channel; a WebP never says so.

    orientation: 1 to 8, by its EXIF data, 1 where it has none. cmyk: a JPEG of four channels.
    """

    width: int
    height: int
    grey: bool
    orientation: int = exif.AS_STORED
    cmyk: bool = False


def header(data: bytes) -> Header:
    """What the decoder will go by.

    Raises BadSample for what is not a still image in one of the three formats, or has no size where it must stand: a
    decoder may find one further on, and take as much memory as that says.
    """
    if data.startswith(JPEG):
        found = _jpeg(data)
    elif data.startswith(PNG):
        found = _png(data)
    elif data.startswith(RIFF) and data[8:12] == b"WEBP":
        found = _webp(data)
    else:
        raise BadSample("is not a JPEG, PNG or WebP image")
    if found is None:
        raise BadSample("cannot be decoded (its header is damaged or cut off)")
    return found


def _jpeg(data: bytes) -> Header | None:
    """The first frame's size. Like libjpeg, it skips bytes between segments that are no marker."""
    at, turned = 2, exif.AS_STORED
    while (at := data.find(b"\xff", at)) >= 0 and at + 9 <= len(data):
        marker = data[at + 1]
        if marker in _FRAME:
            width, height = data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
            channels = data[at + 9 : at + 10]
            return Header(width, height, channels == b"\1", turned, channels == b"\4")
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0 or marker in _STANDALONE:
            at += 2
        else:
            end = at + 2 + max(2, data[at + 2] << 8 | data[at + 3])
            if marker == _APP1 and data.startswith(exif.PREFIX, at + 4):
                turned = exif.orientation(data[at + 4 : end])
            at = end
    return None


def _png(data: bytes) -> Header | None:
    """The size in the only header, which must be the first chunk: Pillow uses the last header before the pixels."""
    if data[12:16] != b"IHDR" or len(data) < 24:
        return None
    at, turned, before_pixels = 8, exif.AS_STORED, True
    while at + 8 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if kind == b"IDAT":
            before_pixels = False
        elif kind == b"eXIf":  # also behind the pixels
            turned = exif.orientation(data[at + 8 : end - 4])
        elif kind == b"acTL" and before_pixels:
            raise BadSample("is animated; only still images can be used")
        elif kind == b"IHDR" and at > 8 and before_pixels:
            return None
        at = end
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return Header(width, height, data[25:26] in _GREY, turned)


def _webp(data: bytes) -> Header | None:
    if len(data) < 30:
        return None
    form = data[12:16]
    if form == b"VP8X":
        if data[20] & _ANIMATION_FLAG:
            raise BadSample("is animated; only still images can be used")
        turned = _of_webp(data) if data[20] & _EXIF_FLAG else exif.AS_STORED
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return Header(width, height, False, turned)
    if form == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return Header(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), False)
    if form == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return Header(width, height, False)
    return None


def _of_webp(data: bytes) -> int:
    """The orientation that the EXIF chunk of an extended WebP says; chunks have an even length."""
    at = 12
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            return exif.orientation(data[at + 8 : end])
        at = end + end % 2
    return exif.AS_STORED
