"""Pictures in rows and columns, as one picture: bare, or each above what it was told."""

import textwrap
from collections.abc import Sequence

import numpy as np
import torch

DARK, LIGHT = 24, 232  # between pictures, and of letters
LEAST_WIDE = 144  # pixels of a picture with words below it
LINES = 3  # of them
LETTER = 6, 11  # pixels of Pillow's own font, which is in every Pillow


class Grid:
    """A picture of n uint8 images (C, H, W) in rows of `columns`, a dark pixel between them; they come in any order."""

    def __init__(self, n: int, columns: int, channels: int, height: int, width: int):
        rows = -(-n // columns)
        self._canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), DARK, np.uint8)
        self._columns = columns

    def put(self, first: int, images: np.ndarray) -> None:
        """Images uint8 (b, H, W, C) in the places from `first` on."""
        height, width = images.shape[1:3]
        for i, image in enumerate(images, first):
            top, left = i // self._columns * (height + 1), i % self._columns * (width + 1)
            self._canvas[top : top + height, left : left + width] = image

    def picture(self, scale: int = 1):
        """By PIL, each pixel `scale` pixels wide."""
        from PIL import Image

        canvas = self._canvas
        picture = Image.fromarray(canvas.squeeze(-1) if canvas.shape[-1] == 1 else canvas)
        return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)


def grid(images: torch.Tensor, columns: int, scale: int = 1):
    """The picture of uint8 images (n, C, H, W), as of `Grid`."""
    found = Grid(len(images), columns, *images.shape[1:])
    found.put(0, images.permute(0, 2, 3, 1).numpy())
    return found.picture(scale)


class CaptionedGrid:
    """Images with words below each, in rows of `columns`: a small picture is made wide enough to read them."""

    def __init__(self, captions: Sequence[str], columns: int, height: int, width: int):
        from PIL import Image

        self._captions, self._columns = captions, columns
        self._scale = -(-LEAST_WIDE // width) if width < LEAST_WIDE else 1
        self._height, self._width = height * self._scale, width * self._scale
        self._cell = self._height + LINES * LETTER[1] + 6
        size = columns * (self._width + 1) - 1, -(-len(captions) // columns) * (self._cell + 1) - 1
        self._picture = Image.new("RGB", size, (DARK, DARK, DARK))

    def put(self, first: int, images: np.ndarray) -> None:
        """Images uint8 (b, H, W, C) in the places from `first` on."""
        from PIL import Image, ImageDraw, ImageFont

        draw, font = ImageDraw.Draw(self._picture), ImageFont.load_default_imagefont()
        for i, image in enumerate(images, first):
            at = i % self._columns * (self._width + 1), i // self._columns * (self._cell + 1)
            shown = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB")
            self._picture.paste(shown.resize((self._width, self._height), Image.NEAREST), at)
            # The font has Latin-1 alone: what it lacks is shown as a mark, and stands in labels.csv as it is.
            words = self._captions[i].encode("latin-1", "replace").decode("latin-1")
            lines = textwrap.wrap(words, self._width // LETTER[0], max_lines=LINES, placeholder=" ...")
            for line, text in enumerate(lines):
                place = at[0] + 2, at[1] + self._height + 3 + line * LETTER[1]
                draw.text(place, text, fill=(LIGHT, LIGHT, LIGHT), font=font)

    def picture(self, scale: int = 1):
        """By PIL."""
        return self._picture
