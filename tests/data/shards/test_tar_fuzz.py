"""Tar files that are cut, flipped, overwritten, spliced or no tar at all: refused by name, or read with nothing lost.

An example of hypothesis is a seed that makes 100 inputs, as an example costs it more than an input costs us. A failure
says the seed and the number of the input.
"""

import io
import os
import tarfile
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrain.data.shards.tar import ABSENT, Scan, scan
from dtrain.errors import UserError
from tests.data.shard_files import LONG_NAME, write_tar

EACH = 100  # inputs an example
INPUTS = int(os.environ.get("DTRAIN_CAMPAIGN_FUZZ", "500"))  # of each kind


def fuzzed(test: Callable) -> Callable:
    """Called with seeds, so many that each makes EACH inputs."""
    several = settings(
        max_examples=max(1, INPUTS // EACH), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    return several(given(seed=st.integers(0, 2**63 - 1))(test))


def inputs(path, seed: int, make: Callable[[np.random.Generator], bytes]):
    """(bytes, the index or the refusal) of each input of a seed, written to `path`."""
    rng = np.random.default_rng(seed)
    for number in range(EACH):
        data = make(rng)
        path.write_bytes(data)
        try:
            found = scan(path)
        except UserError as e:
            found = str(e)
        place = f"input {number} of seed {seed}"
        if isinstance(found, str):
            assert path.name in found, place
            assert "\n" not in found, place
        yield data, found, place


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """One shard with plain, GNU long-name and PAX headers, so that damage can fall into any of them."""
    folder = tmp_path_factory.mktemp("whole")
    parts = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = "short" if form == tarfile.USTAR_FORMAT else LONG_NAME
        members = [(f"{form}{name}-{i}.jpg", bytes([i + 1]) * (i * 400)) for i in range(3)]
        data = write_tar(folder / f"{form}.tar", members, form).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            parts.append(data[: tar.getmembers()[-1].offset_data + 1024])
    return b"".join(parts) + bytes(1024)


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> tuple[bytes, Scan]:
    """A shard of short names: a name of over 100 bytes lies outside the header's checksum, and a flip makes another."""
    path = tmp_path_factory.mktemp("short") / "short.tar"
    write_tar(path, [(f"{i}.jpg", bytes([i + 1]) * (i * 400)) for i in range(5)], tarfile.USTAR_FORMAT)
    return path.read_bytes(), scan(path)


@fuzzed
def test_a_shard_cut_anywhere_is_refused(whole, tmp_path, seed):
    def cut(rng):
        return whole[: int(rng.integers(len(whole) // 512)) * 512 if rng.random() < 0.5 else rng.integers(len(whole))]

    for _, refusal, number in inputs(tmp_path / "cut.tar", seed, cut):
        assert isinstance(refusal, str), number
        assert refusal.endswith("restore it or pack it again"), number


@fuzzed
def test_a_flipped_bit_never_loses_a_sample_silently(short, tmp_path, seed):
    """A flip is noticed, or all members are found where they are and the shard's sha256 is another."""
    content, intact = short

    def flip(rng):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        return bytes(flipped)

    for _, found, number in inputs(tmp_path / "flipped.tar", seed, flip):
        if isinstance(found, Scan):
            assert np.array_equal(found.members[["offset", "size"]], intact.members[["offset", "size"]]), number
            assert found.sha256 != intact.sha256, number


@fuzzed
def test_bytes_that_are_no_tar_are_refused(tmp_path, seed):
    pieces = [bytes(512), b"\x80", b"\xff" * 12, b"ustar", b"0" * 100]

    def noise(rng):
        chosen = (
            pieces[rng.integers(len(pieces))] if rng.random() < 0.5 else rng.bytes(int(rng.integers(600)))
            for _ in range(int(rng.integers(12)))
        )
        return b"".join(chosen)

    for _, refusal, number in inputs(tmp_path / "noise.tar", seed, noise):
        assert isinstance(refusal, str), number


@fuzzed
def test_what_is_made_of_a_shard_overwritten_and_spliced_lies_within_it(whole, tmp_path, seed):
    """Fields of headers set to anything with their checksums put right, blocks moved and doubled."""
    names = {"size": (124, 12), "type": (156, 1), "name": (0, 100), "magic": (257, 8), "prefix": (345, 155)}

    def spoil(rng):
        blocks = [bytearray(whole[at : at + 512]) for at in range(0, len(whole), 512)]
        for _ in range(int(rng.integers(1, 4))):
            block = blocks[rng.integers(len(blocks))]
            start, length = list(names.values())[rng.integers(len(names))]
            digits = bytes(rng.choice(list(b"01234567\x80\xff \0xgLKSV"), length).tolist())
            block[start : start + length] = digits if rng.random() < 0.7 else rng.bytes(length)
            block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
            if rng.random() < 0.3:
                first, second = rng.integers(len(blocks), size=2)
                blocks[first:first] = [blocks[second]]
        return b"".join(blocks)

    for data, found, number in inputs(tmp_path / "spoilt.tar", seed, spoil):
        if isinstance(found, Scan):
            for offset, size, crc32 in found.members.ravel().tolist():
                if size != ABSENT:
                    assert offset + size <= len(data), number
                    assert zlib.crc32(data[offset : offset + size]) == crc32, number
