"""JPEG files by simplejpeg: torchvision's pixels and refusals, whatever the file; reduced ones are Pillow's drafts."""

import io
from collections import Counter

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from dtrain.data.fields import jpeg
from dtrain.data.fields.headers import header
from dtrain.data.fields.image_operator import GRAY, RGB, decode_image
from dtrain.data.fields.jpeg import decode_jpeg
from dtrain.data.fields.picture import decode
from dtrain.errors import BadSample, UserError
from tests.data.scenes import encoded, scene
from tests.data.shard_files import picture


def kinds(height: int, width: int) -> dict[str, bytes]:
    """Files of one scene in the forms that JPEG has."""
    image, found = scene(height, width), {}
    for colours in ("RGB", "L"):
        for chroma in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
            for progressive in (False, True):
                options = {"subsampling": chroma, "progressive": progressive, "quality": 90}
                found[f"{colours} {chroma} {progressive}"] = encoded(image.convert(colours), **options)
    found["stored as RGB"] = encoded(image, quality=90, keep_rgb=True)
    found["restart markers"] = encoded(image, quality=75, restart_marker_blocks=2)
    found["upright chroma"] = simplejpeg.encode_jpeg(np.ascontiguousarray(image), 85, "RGB", "440")
    found["optimized, rough"] = encoded(image, quality=20, optimize=True)
    return found


SIZES = [(1, 1), (7, 9), (16, 16), (33, 47), (64, 31), (97, 120)]
FILES = {f"{name} {height} × {width}": data for height, width in SIZES for name, data in kinds(height, width).items()}


def by_torchvision(data: bytes, channels: int) -> torch.Tensor | str:
    try:
        return decode_image()(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), GRAY if channels == 1 else RGB, False
        )
    except RuntimeError as e:
        return str(e)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_form_of_jpeg_has_the_pixels_that_torchvision_gives_it(channels):
    for name, data in FILES.items():
        found = header(data)
        pixels = decode_jpeg(data, channels, found.height, found.width)
        assert pixels is not None, name
        expected = by_torchvision(data, channels)
        assert np.array_equal(pixels.transpose(2, 0, 1), expected.numpy()), name
        assert torch.equal(decode(data, channels), expected), name


def test_cmyk_is_left_to_the_decoder_that_converts_it_as_pillow_does():
    data = encoded(scene(40, 30).convert("CMYK"), quality=95)
    assert header(data).cmyk
    assert not header(FILES["RGB 4:2:0 False 33 × 47"]).cmyk
    assert torch.equal(decode(data, 3), by_torchvision(data, 3))


def damaged(rng: np.random.Generator) -> bytes:
    data = bytearray(FILES[list(FILES)[rng.integers(len(FILES))]])
    if rng.random() < 0.3:
        return bytes(data[: rng.integers(2, len(data))])
    for at in rng.integers(2, len(data), rng.choice([1, 1, 3, 10])):
        data[at] = rng.integers(256)
    return bytes(data)


def test_damaged_files_are_answered_as_by_torchvision_alone(capfd):
    """Either both give the same pixels, or both refuse: what simplejpeg has any complaint of goes to torchvision."""
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(2500):
        data, channels = damaged(rng), int(rng.choice([1, 3]))
        try:
            found = header(data)
        except BadSample:
            seen["by its header"] += 1
            continue
        if not 0 < found.width * found.height <= 1 << 20:
            continue
        expected = by_torchvision(data, channels)
        try:
            pixels = decode(data, channels)
        except BadSample:
            assert isinstance(expected, str)
            seen["refused"] += 1
            continue
        assert torch.equal(pixels, expected)
        fast = decode_jpeg(data, channels, found.height, found.width)
        seen["with complaints" if fast is None or found.cmyk else "whole"] += 1
    capfd.readouterr()  # libjpeg writes its complaints there
    assert min(seen[what] for what in ("by its header", "refused", "with complaints", "whole")) > 20, seen


@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_a_reduced_jpeg_is_pillows_draft(halvings):
    for name, data in FILES.items():
        found = header(data)
        if min(found.width, found.height) < 31:
            continue
        rows, columns = found.height >> halvings, found.width >> halvings
        for channels, mode in ((1, "L"), (3, "RGB")):
            if (found.grey and mode == "RGB") or ("stored as RGB" in name and mode == "L"):
                continue  # these Pillow converts after decoding
            with Image.open(io.BytesIO(data)) as image:
                image.draft(mode, (columns, rows))
                expected = np.asarray(image).reshape(image.height, image.width, channels)
            assert expected.shape[:2] == (-(-found.height // 2**halvings), -(-found.width // 2**halvings))
            pixels = decode_jpeg(data, channels, found.height, found.width, halvings)
            assert np.array_equal(pixels, expected[:rows, :columns]), name


@pytest.mark.parametrize(
    ("least", "shape"), [(None, (64, 80)), (40, (64, 80)), (32, (32, 40)), (16, (16, 20)), (8, (8, 10)), (1, (8, 10))]
)
def test_a_jpeg_is_halved_while_its_shorter_side_keeps_what_it_must(least, shape):
    data = encoded(scene(64, 80), quality=90)
    assert decode(data, 3, least=least).shape == (3, *shape)


def test_what_cannot_be_reduced_comes_in_full():
    for data in (picture(0, 64, 3, "PNG"), picture(0, 64, 3, "WEBP"), encoded(scene(64, 64).convert("CMYK"))):
        assert torch.equal(decode(data, 3, least=8), decode(data, 3))


def test_without_simplejpeg_pixels_are_the_same_and_reducing_names_the_package(monkeypatch):
    data = FILES["RGB 4:2:0 False 97 × 120"]
    expected = decode(data, 3)
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    assert torch.equal(decode(data, 3), expected)
    with pytest.raises(UserError, match="pip install simplejpeg"):
        decode(data, 3, least=20)
