"""Reading samples by number: the right bytes, and every kind of damage named."""

import multiprocessing
import os
import random

import pytest

from dtrain.data.shards import reader as shards
from dtrain.data.shards.reader import ShardReader
from dtrain.errors import UserError
from tests.data.shard_files import data_set, labelled_pictures


@pytest.fixture
def samples():
    return [{"png": random.Random(i).randbytes(50 + 37 * i), "cls": str(i).encode()} for i in range(25)]


def test_every_sample_has_the_bytes_that_were_written(tmp_path, samples):
    del samples[11]["cls"]
    reader = ShardReader(data_set(tmp_path, samples), tmp_path)
    for number in random.Random(0).sample(range(25), 25):
        assert reader.read(number) == samples[number]
    assert reader.read(10, ("cls",)) == {"cls": b"10"}
    assert reader.read(11, ("cls", "jpg")) == {}
    with pytest.raises(IndexError):
        reader.read(25)


def test_a_forked_process_reads_on_beside_its_parent(tmp_path, samples):
    """Both use the same open files at the same time; neither disturbs the other."""
    reader = ShardReader(data_set(tmp_path, samples), tmp_path)
    reader.read(0)

    def read_everything(times: int) -> bool:
        return all(reader.read(i) == samples[i] for _ in range(times) for i in range(25))

    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(not read_everything(100)))
    process.start()
    assert read_everything(100)
    process.join()
    assert process.exitcode == 0


def test_open_files_are_bounded(tmp_path):
    count = shards.OPEN_SHARDS + 30
    reader = ShardReader(data_set(tmp_path, [{"cls": str(i).encode()} for i in range(count)], 1), tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [reader.read(i)["cls"] for i in range(count)] == [str(i).encode() for i in range(count)]
    assert len(os.listdir("/proc/self/fd")) - before == shards.OPEN_SHARDS
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def refusal(reader: ShardReader, sample: int) -> str:
    with pytest.raises(UserError) as error:
        reader.read(sample)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_flipped_bit_names_shard_and_member(tmp_path, samples):
    manifest = data_set(tmp_path, samples)
    path = tmp_path / "train-000001.tar"
    offset = int(manifest.members[13]["offset"][1]) + 100
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 4]), offset)
    reader = ShardReader(manifest, tmp_path)
    assert refusal(reader, 13).startswith(f"{path}: 000013.png is damaged (its crc32 is not the manifest's); restore")
    assert reader.read(13, ("cls",)) == {"cls": b"13"}
    assert reader.read(12) == samples[12]


def test_a_shard_cut_off_while_in_use_names_shard_and_member(tmp_path, samples):
    manifest = data_set(tmp_path, samples)
    reader = ShardReader(manifest, tmp_path)
    reader.read(0)
    path = tmp_path / "train-000000.tar"
    os.truncate(path, int(manifest.members[5]["offset"][1]) + 10)
    assert refusal(reader, 5).startswith(f"{path}: 000005.png is cut off; restore the shard")
    assert refusal(reader, 7).startswith(f"{path}: the member at byte")  # its header is gone too
    assert reader.read(4) == samples[4]


def test_a_shard_replaced_by_another_is_noticed(tmp_path, samples):
    manifest = data_set(tmp_path, samples)
    (tmp_path / "train-000001.tar").replace(tmp_path / "train-000000.tar")
    assert f"{tmp_path}/train-000000.tar: 000011.png is damaged" in refusal(ShardReader(manifest, tmp_path), 1)


def test_a_missing_shard_is_named(tmp_path, samples):
    manifest = data_set(tmp_path, samples)
    (tmp_path / "train-000002.tar").unlink()
    expected = f"cannot read the shard {tmp_path}/train-000002.tar: No such file or directory; restore it"
    assert refusal(ShardReader(manifest, tmp_path), 24).startswith(expected)


def test_a_sample_is_named_by_its_first_member(tmp_path):
    reader = ShardReader(data_set(tmp_path, labelled_pictures(12)), tmp_path)
    assert reader.name(11) == f"{tmp_path}/train-000001.tar: 000011.cls"
    assert reader.name(11, "png") == f"{tmp_path}/train-000001.tar: 000011.png"
