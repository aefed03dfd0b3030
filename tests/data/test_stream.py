"""Batches: what they hold, that nothing but their place in the run decides it, and how workers end."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.data.declared import declared
from dtrain.data.loader import train_batches
from dtrain.data.order.order import Order
from dtrain.data.shards.manifest import load
from dtrain.data.stream import Completion, StepDataset, read_split, stand_in
from dtrain.errors import UserError
from dtrain.randomness import Draws, Purpose
from tests.data.batches import rows_of
from tests.data.shard_files import configuration, data_set, labelled_pictures, picture
from tests.processes import worker_pids

SAMPLES = 57


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    data_set(path, labelled_pictures(SAMPLES))
    return path


@pytest.mark.parametrize("generator", [1, 2])
def test_a_row_is_its_image_its_label_and_draws_keyed_by_its_number(folder, generator):
    """Against Pillow and draws taken one by one."""
    config = configuration(folder, streams=4, shuffle_window=5, flip=True, generator=generator)
    manifest = load(folder / "manifest.json")
    order, draws, complete = Order(5, [10] * 5 + [7], 4, 5), Draws(5, generator), Completion(config)
    samples = labelled_pictures(SAMPLES)
    dataset = StepDataset(config, manifest, rank=1, world_size=2, images=1000)
    flips = 0
    for index in (0, 3, 11):
        batch = complete(dataset[index])
        k = order.rows(1000 + 8 * index, 8, 1, 2)
        assert batch["k"].tolist() == k.tolist()
        for row, (key, number) in enumerate(zip(k.tolist(), order.sample(k).tolist(), strict=True)):
            pixels = np.asarray(Image.open(io.BytesIO(samples[number]["png"]))).transpose(2, 0, 1)
            if draws.uniform(Purpose.FLIP, key) < 0.5:
                pixels, flips = pixels[:, :, ::-1], flips + 1
            assert np.allclose(batch["image"][row], pixels / 127.5 - 1, atol=1e-6)
            assert batch["label"][row] == number % 3
            assert batch["time"][row] == draws.uniform(Purpose.TIME, key)
            assert batch["drop"][row] == draws.uniform(Purpose.LABEL_DROP, key)
            assert np.array_equal(batch["noise"][row], draws.normal(Purpose.NOISE, key, (3, 8, 8)))
    assert 0 < flips < 12
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "k": (torch.int64, (4,)),
        "image": (torch.float32, (4, 3, 8, 8)),
        "label": (torch.int64, (4,)),
        "time": (torch.float64, (4,)),
        "noise": (torch.float32, (4, 3, 8, 8)),
        "drop": (torch.float64, (4,)),
    }


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 24), (2, 8), (4, 24), (3, 6)])
def test_rows_do_not_depend_on_world_size_batch_size_or_workers(folder, workers, world_size, batch_size):
    """96 images, more than an epoch of 57, stopped in the middle: all bytes of all rows are those of one process."""
    manifest = load(folder / "manifest.json")
    reference = StepDataset(configuration(folder, 32, streams=4, shuffle_window=6, flip=True), manifest, 0, 1, 0)
    expected = rows_of(reference[i] for i in range(3))
    config = configuration(folder, batch_size, streams=4, shuffle_window=6, flip=True, workers=workers)
    rows = {}
    for images, steps in ((0, 48 // batch_size), (48, 48 // batch_size)):
        for rank in range(world_size):
            batches = train_batches(config, manifest, rank, world_size, images)
            rows |= rows_of(islice(batches, steps))
            batches.close()
    assert rows == expected


@pytest.mark.parametrize(("generator", "most"), [(1, 1_000_000), (2, 200_000)])
def test_a_row_on_its_way_to_its_device_has_the_bytes_that_are_declared(tmp_path, generator, most):
    manifest = data_set(tmp_path, [{"png": picture(i, 256), "cls": b"1"} for i in range(4)])
    config = configuration(tmp_path, 4, image_size=256, flip=True, generator=generator)
    batch = StepDataset(config, manifest, 0, 1, 0)[0]
    each = sorted(column.nbytes // 4 for column in batch.values())
    assert each == sorted(declared(config).row_bytes)
    assert sum(each) <= most
    assert (sum(each) > 200_000) == ("noise" in batch) == (generator == 1)


def test_what_stands_in_for_a_batch_is_as_a_completed_one_and_no_number(folder):
    config = configuration(folder, flip=True)
    whole = Completion(config)(StepDataset(config, load(folder / "manifest.json"), 0, 1, 0)[0])
    there = stand_in(declared(config), 8, 8)
    assert {name: (column.dtype, column.shape) for name, column in there.items()} == {
        name: (column.dtype, column.shape) for name, column in whole.items()
    }
    assert there["image"].isnan().all()


def test_streams_follow_the_size_of_the_data_unless_they_are_set(folder, tmp_path):
    manifest = load(folder / "manifest.json")
    k = np.arange(8)
    config = configuration(folder, num_classes=0)
    chosen = Completion(config)(StepDataset(config, manifest, 0, 1, 0)[0])
    pictures = labelled_pictures(SAMPLES)
    expected = [pictures[i]["png"] for i in Order(5, manifest.shard_sizes, 1, 4096).sample(k)]
    pixels = [np.asarray(Image.open(io.BytesIO(png))).transpose(2, 0, 1) / 127.5 - 1 for png in expected]
    assert np.allclose(chosen["image"], np.stack(pixels), atol=1e-6)
    assert chosen.keys() == {"k", "image", "time", "noise"}  # unconditional: no labels, nothing to drop


def test_a_split_is_read_in_the_manifests_order(folder):
    images, labels = read_split(load(folder / "manifest.json"), folder, 8, 3, 8, 23)
    expected = [np.asarray(Image.open(io.BytesIO(s["png"]))) for s in labelled_pictures(SAMPLES)[8:23]]
    assert images.dtype == torch.uint8
    assert np.array_equal(images, np.stack(expected).transpose(0, 3, 1, 2))
    assert labels.tolist() == [i % 3 for i in range(8, 23)]


def test_a_split_without_labels_has_zeros(tmp_path):
    manifest = data_set(tmp_path, [{"png": picture(i, 8, 1)} for i in range(3)])
    images, labels = read_split(manifest, tmp_path, 8, 1, 0, 3)
    assert images.shape == (3, 1, 8, 8)
    assert labels.tolist() == [0, 0, 0]


def first_batch(folder, samples, workers=0, **data) -> None:
    manifest = data_set(folder, samples)
    next(train_batches(configuration(folder, len(samples), workers=workers, **data), manifest, 0, 1, 0))


def changed(number: int, **fields) -> list[dict]:
    samples = labelled_pictures(12)
    samples[number] = {k: v for k, v in (samples[number] | fields).items() if v is not None}
    return samples


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"png": b"hello"}, "{}.png is not a JPEG, PNG or WebP image; restore it"),
        ({"png": picture(0, 64)[:300]}, "{}.png cannot be decoded ("),
        ({"png": None}, "{}.cls is of a sample without a jpg, jpeg, png or webp"),
        ({"cls": None}, "{}.png is of a sample without a `cls` label"),
        ({"cls": b"3"}, "{}.cls holds the label 3, but model.num_classes is 3, so labels go from 0 to 2"),
        ({"cls": b"-1"}, "{}.cls holds '-1', not a class number"),
        ({"cls": b"cat\n"}, "{}.cls holds 'cat\\n', not a class number"),
    ],
)
def test_samples_that_cannot_be_used_are_named(tmp_path, fields, message, workers):
    with pytest.raises(UserError) as error:
        first_batch(tmp_path, changed(11, **fields), workers)
    assert str(error.value).startswith(f"{tmp_path}/train-000001.tar: 000011" + message.removeprefix("{}"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_deleted_shard_is_named(tmp_path, workers):
    manifest = data_set(tmp_path, labelled_pictures(20))
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"^cannot read the shard .*/train-000001.tar: No such file or directory; .*$"):
        list(islice(train_batches(configuration(tmp_path, workers=workers), manifest, 0, 1, 0), 3))


def test_configurations_that_do_not_fit_the_data_are_refused(folder, tmp_path):
    manifest = load(folder / "manifest.json")
    with pytest.raises(UserError, match=r"data.batch_size 8 does not divide by 3 ranks; the nearest that does is 9"):
        train_batches(configuration(folder), manifest, 0, 3, 0)
    with pytest.raises(UserError, match=r"data.streams 58 exceeds the 57 samples of .*manifest.json"):
        train_batches(configuration(folder, streams=58), manifest, 0, 1, 0)
    with pytest.raises(UserError, match=r"model.num_classes is 3, but .*manifest.json has no `cls` field"):
        first_batch(tmp_path / "unlabelled", [{"png": picture(0)}])
    with pytest.raises(UserError, match=r"has fields cls, txt, none of them jpg, jpeg, png or webp"):
        first_batch(tmp_path / "texts", [{"txt": b"a", "cls": b"0"}])


def alive(pids: list[int], seconds: float) -> list[int]:
    """Which processes still run after at most that long; a zombie does not."""
    end = time.monotonic() + seconds
    while True:
        running = []
        for pid in pids:
            try:
                with open(f"/proc/{pid}/stat") as file:
                    running += [pid] if file.read().rsplit(")", 1)[1].split()[0] != "Z" else []
            except FileNotFoundError:
                pass
        if not running or time.monotonic() > end:
            return running
        time.sleep(0.02)


def test_closing_the_iterator_ends_its_workers(folder):
    batches = train_batches(configuration(folder, workers=2), load(folder / "manifest.json"), 0, 1, 0)
    next(batches)
    pids = worker_pids()
    assert len(pids) == 2
    batches.close()
    assert alive(pids, 0) == []


def test_an_error_ends_the_workers(folder, tmp_path):
    manifest = data_set(tmp_path, changed(5, png=b"hello"))
    batches = train_batches(configuration(tmp_path, 4, workers=2), manifest, 0, 1, 0)
    with pytest.raises(UserError):
        list(islice(batches, 3))
    assert worker_pids() == []


def test_workers_leave_a_stop_signal_to_the_rank(folder):
    """SLURM sends SIGTERM to every process of a job step; the rank must still be able to finish its step."""
    config = configuration(folder, workers=2)
    batches = train_batches(config, load(folder / "manifest.json"), 0, 1, 0)
    next(batches)
    for pid in worker_pids():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    rows_of(islice(batches, 6))
    assert len(worker_pids()) == 2
    batches.close()


def _rank(folder, ending: str, sender) -> None:
    batches = train_batches(configuration(folder, workers=2), load(folder / "manifest.json"), 0, 1, 0)
    next(batches)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    sender.send(worker_pids())
    if ending == "wait":
        while True:
            next(batches)
    if ending == "raise":
        raise SystemExit(3)


@pytest.mark.parametrize(
    ("ending", "number"), [("return", None), ("raise", None), ("wait", signal.SIGINT), ("wait", signal.SIGKILL)]
)
def test_no_worker_outlives_its_rank(folder, ending, number):
    """However a rank ends: with its iterator open, by an exception, interrupted, or killed (found out within 5 s)."""
    receiver, sender = multiprocessing.Pipe()
    rank = multiprocessing.get_context("fork").Process(target=_rank, args=(folder, ending, sender))
    rank.start()
    pids = receiver.recv()
    if number:
        os.kill(rank.pid, number)
    rank.join(20)
    assert rank.exitcode is not None
    assert alive(pids, 20) == []


def test_a_program_that_ends_with_its_iterator_open_ends_at_once_and_silently(folder):
    code = f"""if True:
        import multiprocessing.util  # before torch, whose own clean-up at exit then comes first
        from pathlib import Path
        from tests.data import test_stream as t
        batches = t.train_batches(t.configuration(Path({str(folder)!r}), workers=2),
                                  t.load({str(folder / "manifest.json")!r}), 0, 1, 0)
        next(batches)
        print(*t.worker_pids(), flush=True)
    """
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(done.stdout.split()) == 2
    assert alive([int(pid) for pid in done.stdout.split()], 0) == []
    assert time.monotonic() - started < 30
