"""The sequence of images is that of one uninterrupted run, the shuffle is a good one, and a resume costs nothing."""

import hashlib
import json
import os
import shutil
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrain.data.loader import train_batches
from dtrain.data.order.order import Order
from dtrain.data.order.streams import default_streams
from dtrain.data.shards.indexing import index_shards
from dtrain.data.shards.manifest import Document, Shard, SideFile, check_all, load, load_all
from dtrain.data.shards.tar import MEMBER
from dtrain.data.stream import Completion, StepDataset
from dtrain.errors import UserError
from tests.data.shard_files import configuration, labelled_pictures, write_shards

EXAMPLES = int(os.environ.get("DTRAIN_CAMPAIGN_EXAMPLES", "0"))
WORKERS = [0, 1, 4] if EXAMPLES else [0, 0, 0, 1, 4]  # of a rank; in a hurry, fewer of the attempts start processes


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """60 samples whose picture is their number."""
    samples = labelled_pictures(60)
    for number, sample in enumerate(samples):
        sample["cls"] = str(number).encode()
    return write_shards(tmp_path_factory.mktemp("data"), samples, 4)


@settings(max_examples=EXAMPLES or 12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_stops_resizes_and_workers_leave_the_sequence_as_it_was(shards, tmp_path_factory, data):
    """Random N, V, W; attempts of random world sizes 1–8, batch sizes, lengths and 0, 1 or 4 workers."""
    count = data.draw(st.integers(1, len(shards)), "shards")
    folder = shards[0].parent
    manifest = index_shards(shards[:count], tmp_path_factory.mktemp("manifest") / "manifest.json")
    streams = data.draw(st.integers(1, min(9, manifest.samples)), "V")
    options = {"streams": streams, "shuffle_window": data.draw(st.integers(1, 40), "W"), "num_classes": 60}
    seen: dict[int, tuple] = {}
    images = 0
    for _ in range(data.draw(st.integers(1, 3), "attempts")):
        world_size = data.draw(st.integers(1, 8), "R")
        batch_size = world_size * data.draw(st.integers(1, 4), "rows")
        steps = data.draw(st.integers(1, 3), "steps")
        workers = data.draw(st.sampled_from(WORKERS), "workers")
        config = configuration(folder, batch_size, workers=workers, **options)
        complete = Completion(config)
        for rank in range(world_size):
            batches = train_batches(config, manifest, rank, world_size, images)
            for _ in range(steps):
                batch = complete(next(batches))
                for row, k in enumerate(batch["k"].tolist()):
                    assert k not in seen
                    seen[k] = tuple(batch[name][row].numpy().tobytes() for name in ("label", "image", "noise", "time"))
            batches.close()
        images += steps * batch_size
    assert sorted(seen) == list(range(images))
    config = configuration(folder, images, **options)
    whole = Completion(config)(StepDataset(config, manifest, 0, 1, 0)[0])
    for row, k in enumerate(whole["k"].tolist()):
        assert seen[k] == tuple(whole[name][row].numpy().tobytes() for name in ("label", "image", "noise", "time"))
    labels = [int.from_bytes(seen[k][0], "little") for k in range(images)]
    epoch = streams * (manifest.samples // streams)
    for first in range(0, images - epoch + 1, epoch):
        assert len(set(labels[first : first + epoch])) == epoch


@pytest.fixture(scope="module")
def ten_million(tmp_path_factory):
    """10,000 shards of 1,000 samples of two fields: true sizes and manifest, and nothing in the shards."""
    folder = tmp_path_factory.mktemp("large")
    members = np.zeros((10**7, 2), dtype=MEMBER)
    members["offset"] = np.arange(2 * 10**7).reshape(-1, 2) % 2000 * 512 + 512
    (folder / "manifest.members").write_bytes(members.data)
    side = SideFile(file="manifest.members", sha256=hashlib.sha256(members.data).hexdigest())
    listed = [Shard(name=f"x-{n:06d}.tar", samples=1000, bytes=1 << 20, sha256=f"{n:064x}") for n in range(10_000)]
    for shard in listed:
        with open(folder / shard.name, "wb") as file:
            file.truncate(shard.bytes)
    document = Document(format=1, fields=["cls", "jpg"], shards=listed, classes=None, members=side)
    (folder / "manifest.json").write_text(json.dumps(document.model_dump()))
    yield folder
    shutil.rmtree(folder)  # 320 MB


def test_resuming_at_ten_million_samples_takes_less_than_half_a_second(ten_million, tmp_path, monkeypatch):
    """All of it: manifest, side file, each shard's size, the order, and which samples the first batch of a rank has, at
    90 % of the 40th epoch. In CPU time, the least of three: the machine may have other things to do.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = configuration(ten_million, 1024)
    load_all(config.data)  # as the run's first start did, which looks at every byte of the side file
    times = []
    for _ in range(3):
        started = time.process_time()
        manifest = load_all(config.data)
        check_all(manifest, config.data)
        dataset = StepDataset(config, manifest, 3, 8, int(39.9 * 10**7))
        k = dataset._order.rows(int(39.9 * 10**7), 1024, 3, 8)
        _, samples = dataset._order.samples(k)
        times.append(time.process_time() - started)
    assert len(set(samples.tolist())) == 128
    assert min(times) < 0.5
    print(f"\n{min(times):.3f} s")


def test_a_large_side_file_that_was_touched_is_looked_at_again(ten_million, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load(ten_million / "manifest.json")
    side = ten_million / "manifest.members"
    before = side.stat()
    with open(side, "r+b") as file:
        file.seek(123_456_789)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(side, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="is damaged or does not belong to"):
        load(ten_million / "manifest.json")


def class_distance(order: Order, classes: np.ndarray, batch: int, batches: int) -> float:
    """Mean total-variation distance of batches' class histograms from the data set's own."""
    share = np.bincount(classes) / len(classes)
    samples = order.sample(np.arange(batches * batch)).reshape(batches, batch)
    histograms = np.stack([np.bincount(classes[s], minlength=len(share)) for s in samples]) / batch
    return float(np.abs(histograms - share).sum(1).mean() / 2)


def quality_table() -> list[tuple[int, int, float]]:
    """(V, W, distance relative to a uniform shuffle's) on 200 shards of 1,000 samples sorted by 100 classes.

    `benchmarks/order.py` has more of it, with 1,000 shards and 10,000.
    """
    sizes, classes = np.full(200, 1000), np.repeat(np.arange(100), 2000)
    rng = np.random.default_rng(0)
    batch, batches = 256, 600
    chosen = np.stack([classes[rng.choice(200_000, batch, replace=False)] for _ in range(batches)])
    histograms = np.stack([np.bincount(row, minlength=100) for row in chosen]) / batch
    uniform = np.abs(histograms - 0.01).sum(1).mean() / 2
    table = []
    for streams in (1, 8, 64, default_streams(200_000)):
        length = 200_000 // streams
        for window in (256, 4096, length):
            order = Order(1, sizes, streams, window)
            table.append((streams, min(window, length), class_distance(order, classes, batch, batches) / uniform))
    return table


def test_the_shuffle_is_uniform_at_the_full_window_and_nearly_so_at_the_defaults():
    """Printed with `pytest -s`: the table by V and W."""
    table = quality_table()
    print("\nV     W       distance / uniform")
    for streams, window, ratio in table:
        print(f"{streams:<5} {window:<8}{ratio:.3f}")
    by = {(v, w): ratio for v, w, ratio in table}
    assert abs(by[1, 200_000] - 1) < 0.02  # one stream shuffled whole is a uniform shuffle
    assert by[195, 1025] < 1.1  # the defaults: a stream per 1,024 samples, W = 4,096 or the whole stream
    assert by[1, 256] > 3  # the measure sees a bad shuffle
