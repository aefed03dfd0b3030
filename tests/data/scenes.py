"""Pictures with what photographs have, of any size, by their size alone."""

import io

import numpy as np
from PIL import Image


def scene(height: int, width: int) -> Image.Image:
    """Smooth colours, edges and noise."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, height // 7), max(2, width // 7), 3), dtype=np.uint8))
    noise = rng.integers(-12, 13, (height, width, 3))
    levels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + noise
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()
