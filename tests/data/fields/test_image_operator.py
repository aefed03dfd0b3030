"""torchvision's decoder, loaded without torchvision: the same operator."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.data.fields.image_operator import GRAY, RGB, decode_image
from dtrain.errors import UserError


def jpeg() -> torch.Tensor:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    file = io.BytesIO()
    picture.save(file, "jpeg")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def test_it_is_torchvisions_and_bears_its_import():
    ours = decode_image()
    before = [ours(jpeg(), mode, False) for mode in (GRAY, RGB)]
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_image as theirs

    assert (ImageReadMode.GRAY.value, ImageReadMode.RGB.value) == (GRAY, RGB)
    for image, mode in zip(before, (ImageReadMode.GRAY, ImageReadMode.RGB), strict=True):
        assert torch.equal(image, theirs(jpeg(), mode))
        assert torch.equal(image, ours(jpeg(), mode.value, False))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "torchvision's image library in .*torchvision cannot be loaded \\(there is none\\)"),
        ({"image.so": b""}, "cannot be loaded \\(.*image.so: file too short\\); install the one that fits torch"),
    ],
)
def test_a_torchvision_without_a_library_is_named_in_one_line(tmp_path, monkeypatch, files, message):
    package = tmp_path / "torchvision"
    package.mkdir()
    for name, content in {"__init__.py": b"", **files}.items():
        (package / name).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(UserError, match=message):
        decode_image.__wrapped__()
