"""One policy for every kind of picture, label and array: what Pillow's convert gives, or a refusal by name."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.data.fields.field import Picture, View
from dtrain.data.fields.picture import Crop, decode, random_crop
from dtrain.data.fields.samples import SampleReader
from dtrain.data.shards.reader import ShardReader
from dtrain.data.stream import StepDataset
from dtrain.errors import BadSample, UserError
from tests.data.shard_files import configuration, data_set, labelled_pictures, picture

LEVELS = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
RGB = Image.fromarray(LEVELS)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def with_alpha() -> Image.Image:
    return Image.merge("RGBA", (*RGB.split(), Image.fromarray(LEVELS[:, :, 0])))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "data",
    [
        encoded(RGB.convert("CMYK"), "JPEG", quality=95),
        encoded(RGB.convert("L"), "JPEG", quality=95),
        encoded(RGB, "JPEG", progressive=True),
        encoded(RGB.convert("P"), "PNG"),
        encoded(RGB.convert("P"), "PNG", transparency=3),
        encoded(with_alpha(), "PNG"),
        encoded(Image.merge("LA", (RGB.convert("L"), Image.fromarray(LEVELS[:, :, 0]))), "PNG"),
        encoded(RGB.convert("1"), "PNG"),
        encoded(RGB, "WEBP", lossless=True),
        encoded(with_alpha(), "WEBP", lossless=True, exact=True),
    ],
    ids=[
        "cmyk",
        "grey",
        "progressive",
        "palette",
        "palette-alpha",
        "alpha",
        "grey-alpha",
        "1-bit",
        "webp",
        "webp-alpha",
    ],
)
def test_a_still_picture_is_what_pillow_converts_it_to(data, channels):
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L"), dtype=int)
    expected = expected.transpose(2, 0, 1) if channels == 3 else expected[None]
    found = decode(data, channels)
    assert found.shape == expected.shape
    # A grey JPEG is decoded to its own luma; Pillow computes it again from colours that were rounded and clipped.
    own_luma = data[:3] == b"\xff\xd8\xff" and channels == 1 and b"Adobe" not in data
    assert np.abs(found.numpy() - expected).max() <= (24 if own_luma else 1)


def png_of_size(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return head + encoded(RGB, "PNG")[33:]


def jpeg_of_size(width: int, height: int) -> bytes:
    data = encoded(RGB, "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def webp_of_size(width: int, height: int) -> bytes:
    head = (
        b"VP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(head)) + b"WEBP" + head


REFUSED = {
    "bomb": (png_of_size(60_000, 60_000), r"has 60000 × 60000 pixels; between 1 and 67,108,864"),
    "jpeg bomb": (jpeg_of_size(65_000, 65_000), r"has 65000 × 65000 pixels"),
    "webp bomb": (webp_of_size(1 << 24, 1 << 24), r"has 16777216 × 16777216 pixels"),
    "zero size": (png_of_size(0, 5), r"has 0 × 5 pixels"),
    "zero height": (jpeg_of_size(5, 0), r"has 5 × 0 pixels"),
    "16 bits": (encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "PNG"), "has 16 bits"),
    "apng": (encoded(RGB, "PNG", save_all=True, append_images=[RGB.rotate(180)]), "is animated"),
    "webp film": (encoded(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(180)]), "is animated"),
    "gif": (encoded(RGB, "GIF"), "is not a JPEG, PNG or WebP image"),
    "cut off": (encoded(RGB, "WEBP")[:60], r"cannot be decoded \("),
    "nothing": (b"", "is not a JPEG"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_all_else_is_a_bad_sample(kind):
    data, message = REFUSED[kind]
    with pytest.raises(BadSample, match=message):
        decode(data, 3)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_changed_at_random_are_decoded_or_refused(seed):
    """In each format; never another error, never more pixels than the header said."""
    rng = np.random.default_rng(seed)
    for whole in (encoded(RGB, "PNG"), encoded(RGB, "JPEG"), encoded(RGB, "WEBP")):
        for _ in range(30):
            data = bytearray(whole[: rng.integers(len(whole) // 2, len(whole) + 1)])
            for at in rng.integers(0, len(data), rng.integers(0, 6)):
                data[at] = rng.integers(256)
            try:
                image = decode(bytes(data), 3)
            except BadSample:
                continue
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3


def test_a_random_crop_is_a_square_from_inside_at_most_a_fifth_smaller():
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 100, 200).contiguous()  # each column is its own number
    seen = []
    for u in np.random.default_rng(0).random((200, 3)).tolist():
        crop = random_crop(ramp, 20, u)
        assert crop.shape == (3, 20, 20)
        left, right = int(crop[0, 10, 0]), int(crop[0, 10, 19])
        assert 74 <= right - left <= 100  # columns of the source, from 4/5 to all of its shorter side
        seen.append((left, right))
        assert torch.equal(random_crop(ramp, 20, u), crop)
    assert min(left for left, _ in seen) < 8
    assert max(right for _, right in seen) > 192


def test_the_crop_belongs_to_the_image_of_the_run(tmp_path):
    manifest = data_set(tmp_path, labelled_pictures(30, size=16))
    whole = StepDataset(configuration(tmp_path, 12, crop="random"), manifest, 0, 1, 0)
    rows = dict(zip(*(whole[1][name].tolist() for name in ("k", "image")), strict=True))
    for rank in range(3):
        part = StepDataset(configuration(tmp_path, 12, crop="random"), manifest, rank, 3, 12)[0]
        assert all(rows[k] == image for k, image in zip(part["k"].tolist(), part["image"].tolist(), strict=True))
    centred = StepDataset(configuration(tmp_path, 12), manifest, 0, 1, 0)[1]
    assert not np.array_equal(centred["image"], whole[1]["image"])


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def with_arrays(tmp_path, change=lambda samples: None):
    samples = [
        {"png": picture(i), "cls": b"0", "latent.npy": npy(np.full((4, 2), i, np.float16)), "pt": b"x", "pkl": b"y"}
        for i in range(10)
    ]
    change(samples)
    manifest = data_set(tmp_path, samples)
    arrays = {"latent": {"field": "latent.npy", "shape": [4, 2], "dtype": "float16"}}
    return StepDataset(configuration(tmp_path, 10, arrays=arrays), manifest, 0, 1, 0)


def test_npy_fields_come_with_their_image(tmp_path):
    dataset = with_arrays(tmp_path)
    batch = dataset[0]
    samples = dataset._order.samples(batch["k"].numpy())[1]
    assert batch["latent"].dtype == torch.float16
    assert np.array_equal(batch["latent"], np.tile(samples[:, None, None], (1, 4, 2)))


class Trap:
    def __reduce__(self):
        return (open, ("/tmp/dtrain-was-run", "w"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros((4, 3), np.float16)), r"holds float16 \[4, 3\], not float16 \[4, 2\]"),
        (npy(np.zeros((4, 2), np.float32)), r"holds float32 \[4, 2\], not float16 \[4, 2\]"),
        (npy(np.zeros((4, 2), np.float16))[:-3], "is no .npy array that can be read"),
        (b"", "is no .npy array that can be read"),
        (npy(np.array([Trap()]), allow_pickle=True), "is no .npy array that can be read .*allow_pickle"),
        (None, "is of a sample without a latent.npy"),
    ],
)
def test_arrays_of_another_kind_are_bad_samples_and_run_no_code(tmp_path, data, message):
    def change(samples):
        samples[3].pop("latent.npy")
        if data is not None:
            samples[3]["latent.npy"] = data

    with pytest.raises(BadSample, match=message):
        with_arrays(tmp_path, change)[0]


def test_a_ragged_array_comes_with_a_mask_of_what_there_is(tmp_path):
    arrays = [np.random.default_rng(i).standard_normal((i % 4, 2)).astype(np.float32) for i in range(10)]
    samples = [{"png": picture(i), "cls": b"0", "words.npy": npy(array)} for i, array in enumerate(arrays)]
    manifest = data_set(tmp_path, samples)
    words = {"words": {"field": "words.npy", "shape": [3, 2], "ragged": True}}
    dataset = StepDataset(configuration(tmp_path, 10, arrays=words), manifest, 0, 1, 0)
    batch = dataset[0]
    assert (batch["words"].shape, batch["words_mask"].dtype) == ((10, 3, 2), torch.bool)
    for row, sample in enumerate(dataset._order.samples(batch["k"].numpy())[1]):
        array, mask = arrays[sample], batch["words_mask"][row]
        assert mask.tolist() == [i < len(array) for i in range(3)]
        assert np.array_equal(batch["words"][row][mask], array)
        assert not batch["words"][row][~mask].any()
    assert [one.row_bytes for one in dataset._wanted.fields if one.name.startswith("words")] == [24, 3]
    short = configuration(tmp_path, 10, arrays={"words": words["words"] | {"shape": [2, 2]}})
    with pytest.raises(BadSample, match=r"holds \[3, 2\], not at most \[2, 2\]"):
        StepDataset(short, manifest, 0, 1, 0)[0]
    with pytest.raises(UserError, match="'words_mask' is what a batch calls something else"):
        configuration(tmp_path, 10, arrays=words | {"words_mask": {"field": "words.npy", "shape": [3, 2]}})


class Read(Picture):
    """A field that mirrors while it reads, as its view says."""

    def read(self, data, view):
        pixels = super().read(data, view)
        return pixels[..., ::-1].copy() if view.mirrored else pixels

    def complete(self, column, mirrored):
        return super().complete(column, None)


def test_a_picture_beside_the_picture_is_cropped_and_mirrored_with_it(tmp_path):
    """A second file of the same pixels stays equal to the first under random crops and mirroring, wherever that is."""
    samples = [{"png": picture(i, 24), "depth.png": picture(i, 24), "cls": b"0"} for i in range(12)]
    manifest = data_set(tmp_path, samples)
    config = configuration(tmp_path, 12, crop="random", flip=True)
    fields = [Picture("image", 8, 3), *(kind("depth", 8, 3, extensions=("depth.png",)) for kind in (Picture, Read))]
    readers = [SampleReader(ShardReader(manifest, tmp_path), [one]) for one in fields]
    dataset = StepDataset(config, manifest, 0, 1, 0)
    views = [dataset._view_of(k) for k in range(12)]
    assert {view.mirrored for view in views} == {True, False}
    mirrored, seen = torch.tensor([view.mirrored for view in views]), []
    for one, reader in zip(fields, readers, strict=True):
        rows = [reader.read(i, view)[one.name] for i, view in enumerate(views)]
        seen.append(one.complete(one.collate(rows), mirrored))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    batch = StepDataset(config, manifest, 0, 1, 0)[0]
    assert torch.equal(batch["mirrored"], torch.tensor([dataset._view_of(k).mirrored for k in batch["k"].tolist()]))
    plain = readers[0].read(0, View(Crop(8)))["image"]
    assert not np.array_equal(plain, readers[0].read(0, views[0])["image"])
