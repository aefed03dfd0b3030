"""JPEG files by simplejpeg, a thin layer over libjpeg-turbo's own interface: the pixels that torchvision's decoder
gives, bit for bit, in two thirds of its time.
"""

from functools import cache

import numpy as np

from dtrain.errors import UserError


def decode_jpeg(data: bytes, channels: int, height: int, width: int, halvings: int = 0) -> np.ndarray | None:
    """uint8 (H, W, channels) of a whole JPEG of `height` × `width` pixels as stored, grey or in colours but not CMYK.

    halvings: how often its sides are halved, rounded down, at most 3 times: from the lower frequencies of each block,
    without transforming the others. None for what has any damage: another decoder says what it is, or makes the best
    of it. Raises UserError where halvings are asked and simplejpeg is not installed.
    """
    library = _library()
    if library is None:
        if halvings:
            raise UserError("large JPEG files are decoded at a reduced scale by simplejpeg: pip install simplejpeg")
        return None
    colours = "GRAY" if channels == 1 else "RGB"
    try:
        if not halvings:
            return library.decode_jpeg(data, colours)
        # Rounded up, libjpeg's own rounding: the next smaller scale would be of three eighths.
        rows, columns = -(-height >> halvings), -(-width >> halvings)
        reduced = library.decode_jpeg(data, colours, min_height=rows, min_width=columns)
    except ValueError:
        return None
    return reduced[: height >> halvings, : width >> halvings]  # without what stands for less than a whole pixel


@cache
def _library():
    """None where it is not installed: without it JPEG files take longer, and nothing else changes."""
    try:
        import simplejpeg
    except ModuleNotFoundError:
        return None
    return simplejpeg
