"""The data plane on a real S3 server, over HTTP on loopback, as s3fs reaches any object store."""

import os
import shutil

import boto3
import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from dtrain.data.fields.samples import read_labels, read_split
from dtrain.data.loader import train_batches
from dtrain.data.shards import remote
from dtrain.data.shards.cache import BlockCache
from dtrain.data.shards.indexing import index
from dtrain.data.shards.manifest import load
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.verify import verify
from dtrain.data.stream import StepDataset
from dtrain.errors import BadSample, UserError
from tests.data.shard_files import configuration, data_set, labelled_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 pictures in 4 shards on the disk."""
    path = tmp_path_factory.mktemp("shards")
    data_set(path, labelled_pictures(40))
    return path


@pytest.fixture(scope="module")
def client(folder):
    """A client of a server with these shards in s3://bucket/train; s3fs finds the server by the usual variables."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    before = dict(os.environ)
    os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1", "AWS_EC2_METADATA_DISABLED": "true"}
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for shard in folder.glob("*.tar"):
        client.upload_file(str(shard), "bucket", f"train/{shard.name}")
    yield client
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


def test_indexing_a_bucket_finds_what_is_found_on_the_disk(client, folder, tmp_path):
    local = load(folder / "manifest.json")
    for pattern in ("s3://bucket/train/*.tar", "s3://bucket/train/train-{000000..000003}.tar"):
        manifest = index(pattern, tmp_path / "s3.json")
        assert manifest.hash == local.hash
        assert np.array_equal(manifest.members, local.members)
    assert verify(manifest, "s3://bucket/train") == {}


def test_batches_out_of_a_bucket_are_those_from_the_disk_whatever_the_workers(client, folder, tmp_path):
    manifest = load(folder / "manifest.json")
    expected = StepDataset(configuration(folder), manifest, 0, 1, 0)
    for workers in (0, 2):
        place = {"manifest": str(manifest.path), "cache_dir": str(tmp_path / f"cache{workers}")}
        config = configuration(tmp_path, workers=workers, **(place | {"shards": "s3://bucket/train"}))
        batches = train_batches(config, manifest, 0, 1, 0)
        for step in range(4):
            batch = next(batches)
            assert all(np.array_equal(batch[name], value) for name, value in expected[step].items())
        batches.close()


def test_objects_that_are_missing_replaced_or_cut_off_are_named(client, folder, tmp_path):
    for name in ("train-000000.tar", "train-000001.tar", "train-000003.tar"):
        client.upload_file(str(folder / name), "bucket", f"damaged/{name}")
    data = bytearray((folder / "train-000001.tar").read_bytes())
    data[700] ^= 1
    client.put_object(Bucket="bucket", Key="damaged/train-000001.tar", Body=bytes(data))
    client.put_object(Bucket="bucket", Key="damaged/train-000003.tar", Body=bytes(data[:6000]))
    manifest = load(folder / "manifest.json")
    found = verify(manifest, "s3://bucket/damaged")
    assert list(found) == [f"s3://bucket/damaged/train-00000{n}.tar" for n in (1, 2, 3)]
    assert "is missing" in found["s3://bucket/damaged/train-000002.tar"] or "no shard" in str(found)
    reader = ShardReader(manifest, "s3://bucket/damaged", BlockCache(tmp_path, 1 << 30))
    assert reader.read(3) == ShardReader(manifest, folder).read(3)
    with pytest.raises(BadSample, match=r"there is no shard s3://bucket/damaged/train-000002.tar"):
        reader.read(25)
    with pytest.raises(BadSample, match=r"s3://bucket/damaged/train-000003.tar: .* is cut off"):
        reader.read(39)
    refused = 0
    for sample in range(10, 20):
        try:
            assert reader.read(sample) == ShardReader(manifest, folder).read(sample)
        except BadSample:
            refused += 1
    assert refused <= 1


def test_a_bucket_that_is_not_there_or_a_server_that_is_gone_ends_in_one_line(client, folder, tmp_path):
    manifest = load(folder / "manifest.json")
    with pytest.raises(UserError, match=r"s3://nothing/train/train-000000.tar"):
        ShardReader(manifest, "s3://nothing/train", BlockCache(tmp_path, 1 << 30)).read(0)
    address = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"  # nobody listens there
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        with pytest.raises(
            UserError, match=r"cannot read s3://bucket/train/train-000000.tar after 5 attempts"
        ) as error:
            ShardReader(manifest, "s3://bucket/train", BlockCache(tmp_path, 1 << 30)).read(0)
        assert "\n" not in str(error.value)
    finally:
        os.environ["AWS_ENDPOINT_URL"] = address
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_held_out_split_in_a_bucket_is_read_as_from_the_disk(client, folder, tmp_path):
    shutil.copy(folder / "manifest.json", tmp_path)
    shutil.copy(folder / "manifest.members", tmp_path)
    manifest = load(tmp_path / "manifest.json")
    cache = BlockCache(tmp_path / "cache", 1 << 30)
    assert read_labels(manifest, "s3://bucket/train", cache).tolist() == read_labels(manifest, folder).tolist()
    remote_split, local_split = (
        read_split(manifest, place, 8, 3, 5, 25, cache) for place in ("s3://bucket/train", folder)
    )
    assert all(np.array_equal(*pair) for pair in zip(remote_split, local_split, strict=True))
