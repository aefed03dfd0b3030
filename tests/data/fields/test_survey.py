"""A glance at a data set against what Pillow says of its pictures, and what `--check` makes of it."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dtrain.data.fields.survey import named, survey
from dtrain.training.check import check_start
from tests.data.shard_files import configuration, data_set

PICTURES = [(40, 30, "JPEG", "RGB"), (300, 700, "PNG", "RGB"), (64, 65, "WEBP", "RGB"), (16, 90, "JPEG", "L")]
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def picture(width: int, height: int, form: str, mode: str, **more) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width), 99, np.uint8)).convert(mode).save(file, form, **more)
    return file.getvalue()


@pytest.fixture
def mixed(tmp_path):
    """Two shards: every kind of picture, and a photograph whose size stands behind 180 kB of profiles."""
    far = picture(50, 60, "JPEG", "RGB", icc_profile=bytes(180_000))
    assert far.find(b"\xff\xc0") > 1 << 16
    samples = [{EXTENSIONS[p[2]]: picture(*p), "cls": b"1"} for p in PICTURES]
    samples += [{"jpg": far, "cls": b"0"}, {"jpg": b"no picture", "cls": b"0"}]
    return data_set(tmp_path, samples, shard_samples=4)


def test_sizes_are_pillows_and_what_is_no_picture_is_passed_over(mixed):
    found = survey(mixed, mixed.path.parent)
    assert [(h.width, h.height, h.grey) for h in found.headers] == [
        (40, 30, False),
        (300, 700, False),
        (64, 65, False),
        (16, 90, True),
        (50, 60, False),
    ]
    assert found.shorter_sides == [16, 30, 50, 64, 300]
    assert not found.grey
    assert len(survey(mixed, mixed.path.parent, count=2).headers) == 2


def test_the_check_says_what_is_enlarged_shrunk_made_grey_and_what_classes_are_called(mixed):
    config = configuration(mixed.path.parent, batch_size=2, num_classes=2, image_size=64, channels=1)
    assert check_start(config, 1).splitlines()[1:] == [
        "of 5 images looked at, 3 are enlarged to 64 (shorter sides 16 to 50 pixels) and 1 is shrunk to 64 "
        "(shorter sides 300 pixels)",
        "their colours become grey",
        f"2 classes, which {mixed.path} does not name",
    ]
    document = json.loads(mixed.path.read_text())
    mixed.path.write_text(json.dumps(document | {"classes": ["cat", "dog\n"]}))
    assert check_start(config, 1).splitlines()[3] == "2 classes: 0 cat, 1 dog\N{REPLACEMENT CHARACTER}"


def test_digits_need_no_scaling_and_say_so_by_silence(digits):
    config = configuration(digits / "train", batch_size=8, num_classes=10, image_size=8, channels=1)
    assert check_start(config, 1).splitlines()[1:] == ["10 classes, called by their numbers"]


def test_many_classes_are_shortened():
    names = [f"class-{n}" for n in range(1000)]
    assert named(names) == ("1,000 classes: 0 class-0, 1 class-1, 2 class-2, 3 class-3, 4 class-4, …, 999 class-999")


def test_a_glance_needs_neither_torch_nor_numpy(mixed):
    code = (
        "import sys; from dtrain.data.fields import survey; from dtrain.data.shards import manifest\n"
        "m = manifest.load(sys.argv[1])\n"
        "assert len(survey.survey(m, m.path.parent).headers) == 5\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(mixed.path)], check=True)
