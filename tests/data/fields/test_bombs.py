"""Files that promise more than they hold, or more than memory does: refused by their header, before a byte is taken."""

import io
import os
import struct
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
import torch

from dtrain.data.fields.npy import read_array
from dtrain.data.fields.picture import MAX_PIXELS, decode
from dtrain.data.shards.tar import scan
from dtrain.errors import BadSample, UserError
from tests.data.shard_files import picture

SIDE = 31_000  # of a square picture of 2.9 GB
INPUTS = int(os.environ.get("DTRAIN_CAMPAIGN_FUZZ", "3000"))


def with_jpeg_size(data: bytes, side: int) -> bytes:
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", side, side) + data[at + 9 :]


def after_first_segment(data: bytes, stray: bytes) -> bytes:
    at = 4 + int.from_bytes(data[4:6], "big")
    return data[:at] + stray + data[at:]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def header(side: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))


JPEG = with_jpeg_size(picture(0, 64, 3, "JPEG"), SIDE)
TEXT = chunk(b"tEXt", b"Comment\0none")
BOMBS = {
    "a JPEG": JPEG,
    "a JPEG with a stray byte before its header": after_first_segment(JPEG, b"\0"),
    "a JPEG with a page of stray bytes": after_first_segment(JPEG, bytes(range(255)) * 16),
    "a JPEG with a segment shorter than its own length": after_first_segment(JPEG, b"\xff\xfe\0\0"),
    "a JPEG with escaped bytes that are no markers": after_first_segment(JPEG, b"\xff\0\xff\0"),
    "a PNG": png(header(SIDE)),
    "a PNG whose header is its second chunk": png(TEXT, header(SIDE)),
    "a PNG with a second, larger header": png(header(8), header(SIDE)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_whose_header_asks_for_gigabytes_is_refused_without_them(name):
    tracemalloc.start()
    try:
        with pytest.raises(BadSample, match=rf"has {SIDE} × {SIDE} pixels|header is damaged") as error:
            decode(BOMBS[name], 3)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert SIDE**2 > MAX_PIXELS


def test_stray_bytes_that_libjpeg_passes_over_cost_no_picture():
    whole = picture(3, 64, 3, "JPEG")
    assert torch.equal(decode(after_first_segment(whole, b"\0\1\2"), 3), decode(whole, 3))


def as_numpy_reads(data: bytes, dtype: str, shape: list[int]) -> np.ndarray | None:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:
        return None
    return array if array.dtype == dtype and list(array.shape) == shape else None


def read(data: bytes) -> np.ndarray | None:
    try:
        return read_array(data, "float32", [4, 6])
    except BadSample:
        return None


@pytest.mark.parametrize("order", ["C", "F"])
def test_mutated_npy_files_are_read_as_numpy_reads_them_or_are_bad_samples(order):
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    np.save(file, np.asarray(rng.standard_normal((4, 6)), dtype=np.float32, order=order))
    whole, kept = file.getvalue(), 0
    for _ in range(INPUTS // 2):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, len(data)))
            if rng.random() < 0.8:
                data[at] = rng.choice(list(b"0123456789(){}[],:'<>|=fOV \n\0\xff"))
            else:
                data = data[:at] + data[at + int(rng.integers(0, 9)) :]
        expected = as_numpy_reads(bytes(data), "float32", [4, 6])
        if (got := read(bytes(data))) is None:
            continue
        assert expected is not None, bytes(data)
        np.testing.assert_array_equal(got, expected)
        kept += 1
    assert kept  # some mutations only touch values


def test_an_array_whose_header_asks_for_terabytes_takes_nothing():
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20)})
    for shape in ([4, 2], [2**20, 2**20]):
        with pytest.raises(BadSample, match=r"holds float32|has 8 bytes of values"):
            read_array(file.getvalue() + b"\0" * 8, "float32", shape)


def test_a_name_that_says_it_has_gigabytes_is_not_read(tmp_path):
    """The file is sparse: it has no such bytes on disk, but reading would give them."""
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    path = tmp_path / "bomb.tar"
    with path.open("wb") as file:
        file.write(long.tobuf(tarfile.GNU_FORMAT))
        file.truncate(9 << 30)
    with pytest.raises(UserError, match=r"bomb.tar is not a whole uncompressed tar file .*8,589,934,592 bytes"):
        scan(path)
