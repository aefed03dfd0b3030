"""Packing: nothing lost, nothing changed, the same bytes every time, and nothing of the user's overwritten."""

import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections import Counter

import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from dtrain.data.pack import pack as packing
from dtrain.data.pack import writing
from dtrain.data.pack.pack import pack
from dtrain.data.shards.indexing import index
from dtrain.data.shards.manifest import load
from dtrain.errors import UserError
from tests.data.pack.sources import shards_in
from tests.data.shard_files import picture, samples_of
from tests.folders import contents
from tests.longer import longer


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack") / "digits"
    packed = pack("sklearn:digits", folder, holdout=360, seed=1)
    assert str(packed) == f"{folder}: packed 1,437 samples for training and 360 held out"
    return folder


def test_the_two_splits_hold_every_digit_once(digits):
    """Back from the PNG files to scikit-learn's own numbers."""
    source = load_digits()
    labelled = zip(source.images, source.target, strict=True)
    expected = Counter((image.astype(int).tobytes(), int(label)) for image, label in labelled)
    found = Counter()
    for split, count in (("train", 1437), ("holdout", 360)):
        samples = samples_of(digits / split)
        assert len(samples) == count
        for sample in samples:
            image = Image.open(io.BytesIO(sample["png"]))
            assert (image.mode, image.size) == ("L", (8, 8))
            levels = np.asarray(image, dtype=float) * 16 / 255
            assert np.abs(levels - levels.round()).max() < 0.04  # 0..255 in 16 equal steps
            found[levels.round().astype(int).tobytes(), int(sample["cls"])] += 1
    assert found == expected


def test_splits_are_shuffled_and_lie_in_several_shards(digits):
    labels = [int(s["cls"]) for s in samples_of(digits / "train")]
    assert min(Counter(labels[:500]).values()) > 25  # about 50 of each digit
    assert min(Counter(int(s["cls"]) for s in samples_of(digits / "holdout")).values()) > 15  # about 36
    for split in ("train", "holdout"):
        manifest = load(digits / split / "manifest.json")
        assert len(manifest.shards) == 8
        assert manifest.classes == list("0123456789")
        assert [s.name for s in manifest.shards] == [f"{split}-{i:06d}.tar" for i in range(8)]


def test_packed_shards_are_webdatasets(digits):
    url = f"{digits}/holdout/holdout-{{000000..000007}}.tar"
    read = [(s["png"], s["cls"]) for s in webdataset.WebDataset(url, shardshuffle=False, nodesplitter=None)]
    assert read == [(s["png"], s["cls"]) for s in samples_of(digits / "holdout")]
    again = index(str(digits / "holdout"), digits.parent / "again.json")
    assert np.array_equal(again.members, load(digits / "holdout" / "manifest.json").members)


def test_packing_again_gives_the_same_bytes_and_another_seed_others(digits, tmp_path):
    pack("sklearn:digits", tmp_path / "same", holdout=360, seed=1)
    assert contents(tmp_path / "same") == contents(digits)
    pack("sklearn:digits", tmp_path / "other", holdout=360, seed=2)
    mine, other = (load(f / "holdout" / "manifest.json") for f in (digits, tmp_path / "other"))
    assert mine.hash != other.hash


def test_what_the_same_request_packed_is_kept(digits):
    before = {f: f.stat().st_mtime_ns for f in digits.rglob("*")}
    packed = pack("sklearn:digits", digits, holdout=360, seed=1)
    assert str(packed) == f"{digits}: keeping what is there: 1,437 samples for training and 360 held out"
    assert {f: f.stat().st_mtime_ns for f in digits.rglob("*")} == before


def test_other_requests_and_other_folders_are_refused_untouched(digits, tmp_path):
    before = contents(digits)
    with pytest.raises(UserError, match=r"was packed with holdout 360, not 100; name another destination"):
        pack("sklearn:digits", digits, holdout=100, seed=1)
    with pytest.raises(UserError, match=r"was packed with seed 1, not 0"):
        pack("sklearn:digits", digits, holdout=360)
    assert contents(digits) == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and was not made by `dtrain pack`"):
        pack("sklearn:digits", tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_a_packed_folder_that_lost_a_shard_is_not_kept_silently(tmp_path):
    pack("sklearn:digits", tmp_path / "digits")
    (tmp_path / "digits" / "train" / "train-000003.tar").unlink()
    with pytest.raises(UserError, match=r"cannot find the shard .*train-000003.tar"):
        pack("sklearn:digits", tmp_path / "digits")


@pytest.fixture
def photographs(tmp_path):
    files = {
        "cats/1.jpg": picture(1, 9, 3, "JPEG"),
        "cats/deeper/a.b.JPEG": picture(2, 12, 3, "JPEG"),
        "cats/notes.txt": b"not an image",
        "big dogs/1.png": picture(3, 8, 1),
        "big dogs/2.png": picture(4, 8),
        ".cache/1.png": picture(5),
    }
    for name, data in files.items():
        path = tmp_path / "photographs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "photographs"


def test_class_folders_are_copied_byte_for_byte(photographs, tmp_path):
    pack(str(photographs), tmp_path / "packed")
    found = samples_of(tmp_path / "packed" / "train")
    assert load(tmp_path / "packed" / "train" / "manifest.json").classes == ["big dogs", "cats"]
    assert not (tmp_path / "packed" / "holdout").exists()
    expected = [("png", "big dogs/1.png", b"0"), ("png", "big dogs/2.png", b"0")]
    expected += [("jpg", "cats/1.jpg", b"1"), ("jpg", "cats/deeper/a.b.JPEG", b"1")]
    expected = [{field: (photographs / name).read_bytes(), "cls": label} for field, name, label in expected]
    by_items = [sorted(sorted(sample.items()) for sample in samples) for samples in (found, expected)]
    assert by_items[0] == by_items[1]


def test_names_of_any_bytes_are_packed_and_so_is_the_folder_one_is_in(photographs, tmp_path, monkeypatch):
    shutil.copy(photographs / "cats" / "1.jpg", os.fsencode(photographs / "cats") + b"/caf\xe9.jpg")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert pack(str(photographs), ".").train == 5
    assert len(samples_of(tmp_path / "here" / "train")) == 5


def test_a_source_that_has_changed_is_noticed(photographs, tmp_path):
    pack(str(photographs), tmp_path / "packed", holdout=1)
    pack(os.path.relpath(photographs), tmp_path / "packed", holdout=1)  # the same folder by another name
    shutil.copy(photographs / "cats" / "1.jpg", photographs / "cats" / "2.jpg")
    with pytest.raises(UserError, match=r"was packed from .*/photographs when that held other files"):
        pack(str(photographs), tmp_path / "packed", holdout=1)


def test_shards_hold_as_many_samples_as_asked(photographs, tmp_path):
    pack(str(photographs), tmp_path / "packed", shard_samples=3)
    assert load(tmp_path / "packed" / "train" / "manifest.json").shard_sizes.tolist() == [3, 1]


def test_sources_that_cannot_be_packed_are_refused(photographs, tmp_path):
    destination = tmp_path / "packed"
    for source, options, message in [
        (str(tmp_path / "nothing"), {}, "there is no folder .*nothing to pack"),
        (f"{photographs}s", {}, rf"there is no folder .*; did you mean {photographs}\?; SOURCE is"),
        (str(photographs), {"holdout": 4}, "--holdout 4 must leave a sample to train on: .* has 4"),
        (str(photographs), {"holdout": -1}, "--holdout -1 must leave"),
        (str(photographs), {"shard_samples": 0}, "a shard holds at least 1 sample, got 0"),
    ]:
        with pytest.raises(UserError, match=message):
            pack(source, destination, **options)
    (photographs / "empty").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*empty has no .jpg, .jpeg, .png or .webp files"):
        pack(str(photographs), destination)
    (photographs / "empty").rmdir()
    os.mkdir(os.fsencode(photographs) + b"/caf\xe9")
    with pytest.raises(UserError, match=r"the class folder .* has a name that cannot be kept; rename it"):
        pack(str(photographs), destination)
    os.rmdir(os.fsencode(photographs) + b"/caf\xe9")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot pack sklearn:digits into .*file/packed: Not a directory"):
        pack("sklearn:digits", tmp_path / "file" / "packed")
    assert not destination.exists()


def _pack_where_files_are_limited(destination, sender) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as a full disk, in the middle of the first shard
    try:
        pack("sklearn:digits", destination)
    except UserError as e:
        sender.send(str(e))


def test_packing_that_fails_leaves_nothing(tmp_path):
    receiver, sender = multiprocessing.Pipe()
    target = (tmp_path / "packed", sender)
    process = multiprocessing.get_context("fork").Process(target=_pack_where_files_are_limited, args=target)
    process.start()
    process.join()
    assert receiver.poll()
    assert receiver.recv().startswith(f"cannot pack sklearn:digits into {tmp_path}/packed: File too large; ")
    assert list(tmp_path.iterdir()) == []


SIZES = {"shard_samples": 7, "shard_bytes": 9000}  # shards end now by the one and now by the other
MANY = {"holdout": 30, "seed": 4, "format": "jpeg"} | SIZES


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """An .npz of 330 pictures, and what packing it without a disturbance gives."""
    folder = tmp_path_factory.mktemp("many")
    images = np.random.default_rng(0).integers(0, 256, (330, 24, 24, 3), dtype=np.uint8)
    np.savez(folder / "a.npz", images=images, labels=np.arange(330) % 4)
    pack(str(folder / "a.npz"), folder / "one", **MANY, processes=1)
    return folder


def test_shards_are_what_webdatasets_own_writer_makes_of_the_same_samples(many):
    """Cut by samples and by bytes as ShardWriter cuts, and of its bytes."""
    for split in ("train", "holdout"):
        shards = sorted((many / "one" / split).glob("*.tar"))
        (many / "oracle").mkdir(exist_ok=True)
        with webdataset.ShardWriter(
            str(many / "oracle" / f"{split}-%06d.tar"), 7, 9000, verbose=0, mtime=0, encoder=False
        ) as writer:
            for sample in webdataset.WebDataset([str(s) for s in shards], shardshuffle=False, nodesplitter=None):
                writer.write({name: data for name, data in sample.items() if name in ("__key__", "jpg", "cls")})
        assert {s.name: s.read_bytes() for s in shards} == {
            s.name: s.read_bytes() for s in (many / "oracle").glob(f"{split}-*")
        }
    assert {s.samples for s in load(many / "one" / "train" / "manifest.json").shards} >= {6, 7}


def test_any_number_of_processes_packs_the_same_bytes(many):
    seen = []
    pack(str(many / "a.npz"), many / "three", **MANY, processes=3, progress=lambda *done: seen.append(done))
    assert contents(many / "three") == contents(many / "one")
    assert seen == [(n, 330) for n in range(1, 331)]


def _pack_slowly(many, destination, processes) -> None:
    """In a process group of its own, so that its workers die with it as a job's do."""
    os.setpgrp()
    pack(str(many / "a.npz"), destination, **MANY, processes=processes, progress=lambda *_: time.sleep(0.002))


@pytest.mark.parametrize(("processes", "kills"), [longer(1, 6), (2, 2)])
def test_packing_that_was_killed_goes_on_and_ends_with_the_same_bytes(many, tmp_path, processes, kills):
    """SIGKILL at random moments, in both splits and while the manifest is made; whole shards are not written again."""
    rng = np.random.default_rng(processes)
    destination, kept, reused = tmp_path / "killed", {}, 0
    for _ in range(kills):
        target = (many, destination, processes)
        process = multiprocessing.get_context("fork").Process(target=_pack_slowly, args=target)
        process.start()
        partial = tmp_path / ".killed.partial"
        until = len(kept) + int(rng.integers(1, 9))
        while len(shards_in(partial)) < until and process.is_alive():
            time.sleep(0.001)
        time.sleep(float(rng.random()) * 0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert not destination.exists()
        now = {s.name: s.stat().st_ino for s in shards_in(partial)}
        reused += sum(now.get(name) == inode for name, inode in kept.items())
        assert sum(now.get(name) != inode for name, inode in kept.items()) <= 1  # the one that had a name but no line
        kept = now
    (partial / "train" / ".manifest.json.1.tmp").touch()  # as a kill between two steps of its writing leaves it
    seen = []
    pack(str(many / "a.npz"), destination, **MANY, processes=processes, progress=lambda *done: seen.append(done))
    assert contents(destination) == contents(many / "one")
    assert reused > 2 * kills
    assert 0 < len(seen) < 330
    assert list(tmp_path.iterdir()) == [destination]


@pytest.mark.campaign
def test_workers_that_are_killed_end_packing_in_one_line_and_nothing_is_lost(many, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "PIECE", 1)  # so that work is left for them
    others = set(multiprocessing.active_children())

    def on_sample(done: int, of: int) -> None:
        if done == 100:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()

    with pytest.raises(UserError, match=r"a worker process was killed; see that memory suffices"):
        pack(str(many / "a.npz"), tmp_path / "new", **MANY, processes=2, progress=on_sample)
    assert len(list((tmp_path / ".new.partial").rglob("*.tar"))) >= 10
    pack(str(many / "a.npz"), tmp_path / "new", **MANY, processes=2)
    assert contents(tmp_path / "new") == contents(many / "one")


def test_what_another_request_left_when_it_was_killed_is_not_taken_over(many, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_pack_slowly, args=(many, tmp_path / "new", 1))
    process.start()
    while len(shards_in(tmp_path / ".new.partial")) < 3:
        time.sleep(0.001)
    with pytest.raises(UserError, match=r"new is being packed by another process; wait for it"):
        pack(str(many / "a.npz"), tmp_path / "new", **MANY)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    pack("sklearn:digits", tmp_path / "new", holdout=360, seed=1)
    assert load(tmp_path / "new" / "train" / "manifest.json").samples == 1437
    assert json.loads((tmp_path / "new" / packing.REQUEST).read_text())["source"] == "sklearn:digits"
    assert {f.name for f in (tmp_path / "new").iterdir()} == {"train", "holdout", packing.REQUEST}


def test_npz_files_and_other_shards_are_packed_and_shards_end_by_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(40) % 4
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    pack(str(tmp_path / "a.npz"), tmp_path / "one", holdout=5, seed=3)
    found = samples_of(tmp_path / "one" / "train") + samples_of(tmp_path / "one" / "holdout")
    by_pixels = {np.asarray(Image.open(io.BytesIO(s["png"]))).tobytes(): int(s["cls"]) for s in found}
    assert by_pixels == {image.tobytes(): label for image, label in zip(images, labels.tolist(), strict=True)}

    seen = []
    pack(
        str(tmp_path / "one/train/manifest.json"),
        tmp_path / "two",
        shard_bytes=2000,
        format="webp",
        progress=lambda *a: seen.append(a),
    )
    again = load(tmp_path / "two/train/manifest.json")
    assert again.fields == ["cls", "webp"]
    assert again.classes == ["0", "1", "2", "3"]
    assert len(again.shards) > 5
    assert again.samples == 35
    assert seen == [(n, 35) for n in range(1, 36)]
    kept = sorted(s["cls"] for s in samples_of(tmp_path / "two" / "train"))
    assert kept == sorted(s["cls"] for s in samples_of(tmp_path / "one" / "train"))
    with pytest.raises(UserError, match=r"--format tiff is not one of png, jpeg, webp"):
        pack(str(tmp_path / "a.npz"), tmp_path / "three", format="tiff")
    np.savez(tmp_path / "b.npz", images=images.astype(float))
    with pytest.raises(UserError, match=r"`images` is float64 \(40, 8, 8, 3\), not uint8"):
        pack(str(tmp_path / "b.npz"), tmp_path / "three")
