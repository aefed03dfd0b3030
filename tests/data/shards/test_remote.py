"""Shards behind real HTTP servers that stall, truncate, lie and fail; the cache; commands; other storages by fsspec."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dtrain.data.loader import train_batches
from dtrain.data.shards import cache as caching
from dtrain.data.shards import remote
from dtrain.data.shards.cache import BLOCK, BlockCache
from dtrain.data.shards.indexing import index
from dtrain.data.shards.manifest import load
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.verify import verify
from dtrain.data.stream import StepDataset
from dtrain.errors import BadSample, UserError
from tests.data.servers import serve
from tests.data.shard_files import configuration, data_set, labelled_pictures


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.4)


SAMPLES = [{"bin": np.random.default_rng(i).bytes(40_000 + 17 * i), "cls": str(i).encode()} for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    data_set(path, SAMPLES, 15)
    return path


@pytest.fixture
def server(folder):
    with serve(folder) as (url, behaviour):
        yield url, behaviour


def reader_of(folder, url, place, limit=1 << 30):
    return ShardReader(load(folder / "manifest.json"), url, BlockCache(place, limit))


def test_samples_come_over_http_as_from_the_disk_and_once_only(folder, server, tmp_path):
    url, behaviour = server
    first = reader_of(folder, url, tmp_path)
    assert [first.read(i) for i in range(30)] == SAMPLES
    fetched = len(behaviour.requests)
    assert fetched == sum(-(-s.bytes // BLOCK) for s in load(folder / "manifest.json").shards)
    another = reader_of(folder, url, tmp_path)  # as another rank of the node
    assert [another.read(i) for i in range(30)] == SAMPLES
    assert len(behaviour.requests) == fetched
    assert another.counts[0] == 0
    assert another.counts[2] == 0


def test_a_prefetch_asks_for_neighbouring_blocks_at_once(folder, server, tmp_path):
    url, behaviour = server
    reader = reader_of(folder, url, tmp_path)
    reader.prefetch(range(30), ("bin", "cls"))
    assert len(behaviour.requests) == 2  # shards of 3 blocks
    assert [reader.read(i) for i in range(30)] == SAMPLES
    assert len(behaviour.requests) == 2
    assert reader.counts[2] == 6


@pytest.mark.parametrize("mode", ["503", "stall", "truncate", "long length", "short", "flip"])
def test_trouble_that_passes_is_not_noticed(folder, server, tmp_path, mode):
    url, behaviour = server
    behaviour.mode, behaviour.times = mode, 1 if mode == "flip" else 3
    assert reader_of(folder, url, tmp_path).read(3) == SAMPLES[3]


@pytest.mark.parametrize(
    ("mode", "message", "permanent"),
    [
        ("503", r"cannot read {} after 5 attempts \(HTTP 503\)", False),
        ("stall", r"cannot read {} after 5 attempts \(.*imeout", False),
        ("truncate", r"cannot read {} after 5 attempts \(", False),
        ("long length", r"cannot read {} after 5 attempts \(", False),
        ("short", r"{}: the member at byte 1,024,000|{}: the member at byte .* is cut off", True),
        ("flip", r"{}: the member at byte .* is damaged \(its crc32", True),
        ("ignore ranges", r"{}: the server ignores byte ranges", False),
    ],
)
def test_trouble_that_stays_names_the_url(folder, server, tmp_path, mode, message, permanent):
    url, behaviour = server
    behaviour.mode = mode
    started = time.monotonic()
    with pytest.raises(UserError, match=message.replace("{}", f"{url}/train-000000.tar")) as error:
        reader_of(folder, url, tmp_path).read(12, ("bin",))
    assert isinstance(error.value, BadSample) is permanent
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 6


def test_a_shard_that_is_not_there_is_a_bad_sample(folder, server, tmp_path):
    url, _ = server
    with pytest.raises(BadSample, match=f"there is no shard {url}/other/train-000000.tar"):
        reader_of(folder, f"{url}/other", tmp_path).read(0)


def test_indexing_and_verifying_over_http_find_what_they_find_on_disk(folder, server, tmp_path):
    url, behaviour = server
    local = load(folder / "manifest.json")
    with pytest.raises(UserError, match=r"is remote; say where the manifest shall go with `--out`"):
        index(f"{url}/train-000000.tar")
    behaviour.mode, behaviour.times = "503", 2
    manifest = index(f"{url}/train-{{000000..000001}}.tar", tmp_path / "remote.json")
    assert manifest.hash == local.hash
    assert np.array_equal(manifest.members, local.members)
    assert verify(manifest, url) == {}
    behaviour.mode, behaviour.times = "flip", None
    assert set(verify(manifest, url)) == {f"{url}/train-000000.tar", f"{url}/train-000001.tar"}


def test_batches_over_http_are_those_from_the_disk_whatever_the_workers(tmp_path):
    data_set(tmp_path / "data", labelled_pictures(40))
    manifest = load(tmp_path / "data" / "manifest.json")
    expected = StepDataset(configuration(tmp_path / "data"), manifest, 0, 1, 0)
    with serve(tmp_path / "data") as (url, _):
        for workers in (0, 2):
            place = {"manifest": str(manifest.path), "cache_dir": str(tmp_path / f"cache{workers}")}
            config = configuration(tmp_path, workers=workers, **(place | {"shards": url}))
            batches = train_batches(config, manifest, 0, 1, 0)
            for step in range(4):
                batch = next(batches)
                assert all(np.array_equal(batch[name], value) for name, value in expected[step].items())
            batches.close()


def test_other_storages_are_read_by_fsspec(folder, tmp_path):
    memory = fsspec.filesystem("memory")
    for shard in folder.glob("*.tar"):
        memory.pipe(f"/bucket/a/{shard.name}", shard.read_bytes())
    manifest = index("memory://bucket/a/*.tar", tmp_path / "m.json")
    assert manifest.hash == load(folder / "manifest.json").hash
    reader = ShardReader(manifest, "memory://bucket/a", BlockCache(tmp_path / "cache", 1 << 30))
    assert [reader.read(i) for i in range(30)] == SAMPLES


def used(folder) -> int:
    return sum(f.stat().st_size for f in folder.glob("??/*"))


def test_the_cache_keeps_its_limit_and_what_was_used_last(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "_FRESH", -1)
    cache = BlockCache(tmp_path, 1 << 20)
    data = bytes(50_000)
    for n in range(100):
        cache.write("k", n, data)
        assert cache.read("k", 0, len(data), 10, 20) == data[10:20]  # used all the time
        assert used(tmp_path) <= (1 << 20) * (1 + 1 / 64) + 50_000
        time.sleep(0.001)
    assert cache.read("k", 99, len(data), 0, 50_000) == data
    assert cache.read("k", 1, len(data), 0, 1) is None


def test_a_block_that_was_spoilt_on_disk_is_fetched_again(folder, server, tmp_path):
    url, _ = server
    reader = reader_of(folder, url, tmp_path)
    reader.read(0)
    for block in tmp_path.glob("??/*"):
        block.write_bytes(bytes(block.stat().st_size))
    assert reader.read(0) == SAMPLES[0]
    for block in tmp_path.glob("??/*"):
        block.write_bytes(b"")
    assert reader.read(0) == SAMPLES[0]


def _fill(place) -> None:
    cache = BlockCache(place, 4 << 20)
    for n in range(10**6):
        cache.write("k", n % 40, bytes([n % 40]) * 200_000)


def test_a_kill_in_the_middle_of_writing_leaves_whole_blocks(tmp_path):
    for _ in range(5):
        process = multiprocessing.get_context("fork").Process(target=_fill, args=(tmp_path,))
        process.start()
        cache, end = BlockCache(tmp_path, 4 << 20), time.monotonic() + 30
        while sum(cache.read("k", n, 200_000, 0, 200_000) is not None for n in range(40)) < 10:
            assert time.monotonic() < end
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = [cache.read("k", n, 200_000, 0, 200_000) for n in range(40)]
        assert sum(block is not None for block in found) >= 10
        assert all(block == bytes([n]) * 200_000 for n, block in enumerate(found) if block is not None)
        cache.write("other", 0, bytes(100))  # the lock went with its owner


def test_commands_run_only_when_they_may_and_their_shards_are_checked(folder, tmp_path):
    commands = [f"pipe:cat {folder}/train-00000{n}.tar" for n in range(2)]
    manifest = index(commands, tmp_path / "pipes.json")
    assert manifest.hash == load(folder / "manifest.json").hash
    place = {"shards": "pipe:", "manifest": str(manifest.path)}
    with pytest.raises(UserError, match=r"'pipe:' would run a command; say allow_pipe: true"):
        configuration(tmp_path, **place)
    configuration(tmp_path, allow_pipe=True, **place)
    reader = ShardReader(manifest, "pipe:", BlockCache(tmp_path / "cache", 1 << 30))
    assert [reader.read(i) for i in range(30)] == SAMPLES
    assert reader.counts[1:] == (58, 2)  # each command ran once
    failing = index([f"pipe:cat {folder}/train-000001.tar"], tmp_path / "one.json")
    object.__setattr__(failing.shards[0], "name", "pipe:cat /nowhere.tar")
    with pytest.raises(
        UserError, match=r"cannot read pipe:••• of shard 0 after 5 attempts \(its command ended with exit code 1\)"
    ):
        ShardReader(failing, "pipe:", BlockCache(tmp_path / "cache2", 1 << 30)).read(0)


def test_a_cache_that_another_user_made_is_read_and_left_alone(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("being another user takes root")
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    theirs = BlockCache(place, 1 << 20)
    theirs.write("k", 0, bytes(1000))
    theirs.write("k", 1, bytes(1000))
    old = time.time() - 1000
    os.utime(theirs.path("k", 0), (old, old))
    place.chmod(0o755)
    os.seteuid(65534)
    try:
        ours = BlockCache(place, 1 << 20)
        assert ours.read("k", 0, 1000, 0, 10) == bytes(10)
        ours.drop("k", 0)
        with suppress(OSError):
            ours._sweep()
        assert ours.has("k", 0, 1000)
        with pytest.raises(UserError, match=r"cannot write to data.cache_dir"):
            ours.write("k", 2, bytes(10))
    finally:
        os.seteuid(0)
        shutil.rmtree(place)
