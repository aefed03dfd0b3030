"""Decoding against Pillow, cropping against torch's own resampling, and the range of pixels."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dtrain.data.fields.picture import centre_crop, decode, looked_up, mirror, normalize, quantize
from dtrain.errors import UserError
from tests.data.shard_files import picture
from tests.devices import DEVICES


def as_pillow_reads(data: bytes, mode: str) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert(mode), dtype=np.int64)
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize(("inside", "asked"), [(3, 3), (1, 1), (1, 3)])
def test_images_are_decoded_as_pillow_does(form, inside, asked):
    data = picture(1, 37, inside, form)
    image = decode(data, asked)
    assert image.dtype == torch.uint8
    assert image.shape == (asked, 37, 37)
    difference = image.numpy() - as_pillow_reads(data, "L" if asked == 1 else "RGB")
    assert np.abs(difference).max() <= (0 if form == "PNG" else 1)


def test_colours_become_luma_when_grey_is_asked():
    data = picture(2, 16, 3, "PNG")
    red, green, blue = as_pillow_reads(data, "RGB")
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    assert np.abs(decode(data, 1).numpy()[0] - luma).max() < 1.01  # libpng rounds down


def sixteen_bit() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a JPEG, PNG or WebP image"),
        (b"hello", "is not a JPEG, PNG or WebP image"),
        (picture(0, 8, 3, "GIF"), "is not a JPEG, PNG or WebP image"),
        (picture(0, 64, 3, "JPEG")[:500], r"cannot be decoded \(Image is incomplete or truncated\)"),
        (picture(0, 64, 3, "PNG")[:500], r"cannot be decoded \("),
        (picture(0, 64, 3, "JPEG")[:4], r"cannot be decoded \("),
        (picture(0, 64, 3, "PNG")[:8], r"cannot be decoded \("),
        (sixteen_bit(), "has 16 bits a channel, not 8"),
    ],
)
def test_what_is_no_whole_image_is_refused_in_one_line(data, message):
    with pytest.raises(UserError, match=message) as error:
        decode(data, 3)
    assert "\n" not in str(error.value)
    assert ".cpp" not in str(error.value)


def noise(height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    # Away from black and white: Pillow clips between its two passes what bicubic weights overshoot.
    return torch.randint(64, 192, (channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_right_size_is_left_as_it_is(channels):
    image = noise(16, 16, channels)
    assert torch.equal(centre_crop(image, 16), image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(16, 25), (24, 16), (16, 17)])
def test_an_image_whose_shorter_side_fits_is_only_cut(channels, height, width):
    image = noise(height, width, channels)
    top, left = (height - 16) // 2, (width - 16) // 2
    assert torch.equal(centre_crop(image, 16), image[:, top : top + 16, left : left + 16])


@pytest.mark.parametrize(("factor", "tolerance"), [(2, 1), (4, 2)])
def test_an_image_a_power_of_two_too_large_is_averaged(factor, tolerance):
    image = noise(16 * factor, 16 * factor)  # Pillow rounds up to ½ twice a halving, once a direction
    mean = image.double().reshape(3, 16, factor, 16, factor).mean((2, 4))
    assert (centre_crop(image, 16).double() - mean).abs().max() <= tolerance


@pytest.mark.parametrize(("height", "width"), [(20, 28), (30, 21), (9, 12)])
def test_other_sizes_are_scaled_bicubically(height, width):
    """Against torch's antialiased bicubic resampling, which uses the same kernel."""
    image = noise(height, width)
    scale = 16 / min(height, width)
    shape = (round(height * scale), round(width * scale))
    scaled = torch.nn.functional.interpolate(image[None].double(), shape, mode="bicubic", antialias=True)[0]
    top, left = (shape[0] - 16) // 2, (shape[1] - 16) // 2
    expected = scaled.round().clamp(0, 255)[:, top : top + 16, left : left + 16]
    assert (centre_crop(image, 16) - expected).abs().max() <= 1


def test_large_images_are_halved_before_they_are_scaled():
    image = noise(56, 70)
    halved = image.double().reshape(3, 28, 2, 35, 2).mean((2, 4)).round().to(torch.uint8)
    assert (centre_crop(image, 16).double() - centre_crop(halved, 16).double()).abs().max() <= 2


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 20), st.sampled_from([1, 3]), st.integers(0, 255))
def test_every_size_comes_out_square_and_a_flat_colour_stays(height, width, size, channels, level):
    image = centre_crop(torch.full((channels, height, width), level, dtype=torch.uint8), size)
    assert torch.equal(image, torch.full((channels, size, size), level, dtype=torch.uint8))


def test_levels_go_from_minus_one_to_one_and_back_exactly():
    levels = torch.arange(256, dtype=torch.uint8)
    normal = normalize(levels)
    assert normal.dtype == torch.float32
    assert normal[[0, 255]].tolist() == [-1, 1]
    assert torch.allclose(normal.double(), levels.double() * 2 / 255 - 1, atol=1e-7)
    assert torch.equal(quantize(normal), levels)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_normalizes_and_mirrors_to_the_same_bits(device):
    levels = torch.arange(256, dtype=torch.uint8).view(2, 2, 8, 8)
    mirrored = torch.tensor([True, False])
    expected = torch.stack([levels[0].flip(-1), levels[1]]).to(torch.float32) / 127.5 - 1
    there = mirror(levels.to(device), mirrored.to(device))
    for found in (normalize(there), looked_up(there)):
        assert torch.equal(found.cpu(), expected)


def test_floats_go_to_the_nearest_level_and_are_clipped():
    values = torch.linspace(-1.5, 1.5, 30_001, dtype=torch.float64)
    nearest = np.abs(np.arange(256)[:, None] - (values.numpy() + 1) * 127.5).argmin(0)
    assert (quantize(values).numpy() != nearest).mean() < 1e-3  # only where two levels are equally near
    assert np.abs(quantize(values).numpy() - nearest).max() <= 1
    assert quantize(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
