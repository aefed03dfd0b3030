"""Folders as people have them: nothing that training would refuse is packed, nothing is left out unsaid."""

import io
import multiprocessing
import os
import shutil
import signal
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.data.fields.picture import Crop, decode
from dtrain.data.loader import train_batches
from dtrain.data.pack import writing
from dtrain.data.pack.pack import pack
from dtrain.data.pack.source import Choice
from dtrain.data.shards.manifest import load
from dtrain.errors import UserError
from tests.data.pack.sources import lay, packed_names, shards_in
from tests.data.shard_files import configuration, picture, samples_of
from tests.folders import contents


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
TURNED = NOISE.rotate(90)
DAMAGED = saved(NOISE, "PNG").replace(b"IDAT", b"IDAX")
FIT = {
    "a.jpg": picture(1, 9, 3, "JPEG"),
    "b.JPEG": picture(2, 31, 3, "JPEG"),
    "c.png": picture(3, 8, 1),
    "d.webp": picture(4, 20, 3, "WEBP"),
    "cmyk.jpg": saved(NOISE.convert("CMYK"), "JPEG"),
    "palette.png": saved(NOISE.convert("P"), "PNG"),
    "alpha.png": saved(NOISE.convert("RGBA"), "PNG"),
    "camera.jpg": saved(NOISE, "MPO", save_all=True, append_images=[TURNED]),
    "png by content.jpg": picture(5, 12),
}
UNFIT = {
    "cut.jpg": (saved(NOISE, "JPEG")[:-200], "truncated"),
    "cut.png": (saved(NOISE, "PNG")[:-200], "truncated"),
    "cut.webp": (saved(NOISE, "WEBP")[:-100], "truncated"),
    "deep.png": (
        saved(Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)), "PNG"),
        "more than 8 bits a channel",
    ),
    "moving.png": (saved(NOISE, "PNG", save_all=True, append_images=[TURNED]), "animated"),
    "moving.webp": (saved(NOISE, "WEBP", save_all=True, append_images=[TURNED]), "animated"),
    "page.jpg": (b"<html>404</html>", "not JPEG, PNG or WebP inside"),
    "nothing.png": (b"", "empty file"),
    "broken.png": (DAMAGED, "damaged"),
    "bomb.png": (saved(Image.new("1", (9000, 9000)), "PNG"), "no pixels, or more than 67 million"),
    "notes.txt": (b"x", "no picture"),
    "README": (b"x", "no picture"),
    "old.bmp": (saved(NOISE, "BMP"), "not JPEG, PNG or WebP; convert it"),
    ".hidden.jpg": (picture(6, 9, 3, "JPEG"), "hidden file"),
    "._a.jpg": (b"\x00\x05\x16\x07", "hidden file"),
    ".trash/gone.png": (picture(7), "hidden folder"),
    "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg": (picture(8, 9, 3, "JPEG"), "in @eaDir"),
    "__MACOSX/a.jpg": (picture(9, 9, 3, "JPEG"), "in __MACOSX"),
    ".ipynb_checkpoints/a-checkpoint.png": (picture(10), "hidden folder"),
}


@pytest.fixture
def flat(tmp_path):
    return lay(tmp_path / "flat", FIT | {name: data for name, (data, _) in UNFIT.items()})


def test_a_flat_folder_becomes_pictures_without_labels_and_every_other_file_has_a_reason(flat, tmp_path):
    done = pack(str(flat), tmp_path / "packed", holdout=2)
    assert (done.train, done.holdout) == (len(FIT) - 2, 2)
    assert packed_names(tmp_path / "packed", flat) == dict.fromkeys(FIT)
    assert {one.name: one.reason for one in done.left_out} == {name: reason for name, (_, reason) in UNFIT.items()}
    manifest = load(tmp_path / "packed/train/manifest.json")
    assert manifest.classes is None
    assert set(manifest.fields) <= {"jpg", "png", "webp"}
    lines = (tmp_path / "packed/left-out.tsv").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(UNFIT)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_in_another_format_the_same_pictures_are_taken_and_all_can_be_decoded(flat, tmp_path, form):
    done = pack(str(flat), tmp_path / "packed", format=form)
    assert {one.name: one.reason for one in done.left_out} == {name: reason for name, (_, reason) in UNFIT.items()}
    found = samples_of(tmp_path / "packed/train")
    assert sorted(decode(next(iter(s.values())), 3).shape[1:] for s in found) == sorted(
        Image.open(io.BytesIO(data)).size[::-1] for data in FIT.values()
    )


def test_what_was_packed_is_exactly_what_training_decodes(flat, tmp_path):
    """Asked of training's own decoder, file by file, grey and in colour."""

    def decodes(data: bytes) -> bool:
        try:
            return bool(len(decode(data, 3)) and len(decode(data, 1)))
        except UserError:
            return False

    pack(str(flat), tmp_path / "packed")
    visible = [f for f in flat.iterdir() if f.is_file() and not f.name.startswith(".")]
    assert set(packed_names(tmp_path / "packed", flat)) == {f.name for f in visible if decodes(f.read_bytes())}


def test_the_report_names_what_was_taken_left_out_and_the_classes(tmp_path):
    files = {f"{name}/{i}.jpg": picture(i + ord(name[0]), 9, 3, "JPEG") for name in ("cat", "dog") for i in range(6)}
    files |= {f"cat/{i}.txt": b"" for i in range(4)} | {"dog/x.png": DAMAGED, "loose.jpg": picture(0)}
    done = pack(str(lay(tmp_path / "pets", files)), tmp_path / "packed", holdout=3)
    assert done.report.splitlines() == [
        f"{tmp_path}/packed: packed 9 samples for training and 3 held out",
        "pictures: 12 jpg",
        "classes: 0 cat, 1 dog",
        f"left out 6, each named in {tmp_path}/packed/left-out.tsv:",
        "  4 .txt (no picture): cat/0.txt, cat/1.txt, cat/2.txt, …",
        "  1 .jpg (beside the class folders): loose.jpg",
        "  1 .png (damaged): dog/x.png",
    ]
    again = pack(str(tmp_path / "pets"), tmp_path / "packed", holdout=3).report
    assert again == done.report.replace("packed 9", "keeping what is there: 9")


def test_many_classes_are_shown_shortened(tmp_path):
    files = {f"class {n:02d}/1.png": picture(n) for n in range(30)}
    report = pack(str(lay(tmp_path / "many", files)), tmp_path / "packed").report
    assert "classes: 0 class 00, 1 class 01, " in report
    assert "19 class 19, and 10 more (`classes` in train/manifest.json)" in report


@pytest.fixture
def splits(tmp_path):
    files = {
        f"{split}/{name}/{i}.png": picture(hash_of(split, name, i))
        for split, names in (("train", "abc"), ("val", "bc"))
        for name in names
        for i in range(3)
    }
    return lay(tmp_path / "splits", files | {"annotations/list.txt": b""})


def hash_of(*parts) -> int:
    return sum(ord(c) * 31**n for n, c in enumerate("".join(map(str, parts)))) % 2**31


def test_split_folders_are_no_classes_and_one_of_several_is_to_be_chosen(splits, tmp_path):
    with pytest.raises(UserError, match=r"splits holds the splits train, val; choose one, such as `--split train`"):
        pack(str(splits), tmp_path / "packed")
    with pytest.raises(UserError, match=r"splits has no split test; it holds train, val"):
        pack(str(splits), tmp_path / "packed", choice=Choice(split="test"))
    done = pack(str(splits), tmp_path / "packed", choice=Choice(split="train"))
    assert done.notes == ("took the split train; beside it: annotations, val",)
    assert done.classes == ["a", "b", "c"]
    assert set(packed_names(tmp_path / "packed", splits)) == {f"train/{c}/{i}.png" for c in "abc" for i in range(3)}
    with pytest.raises(UserError, match=r"was packed with split 'train', not 'val'"):
        pack(str(splits), tmp_path / "packed", choice=Choice(split="val"))


def test_another_split_numbers_its_classes_as_the_training_split_does(splits, tmp_path):
    done = pack(str(splits), tmp_path / "packed", choice=Choice(split="val"))
    assert done.classes == ["a", "b", "c"]
    found = packed_names(tmp_path / "packed", splits)
    assert found == {f"val/{c}/{i}.png": n for n, c in ((1, "b"), (2, "c")) for i in range(3)}


def test_a_class_may_be_called_like_a_split_and_a_lonely_split_is_taken(tmp_path):
    vehicles = lay(tmp_path / "vehicles", {f"{n}/1.png": picture(i) for i, n in enumerate(["plane", "ship", "train"])})
    assert pack(str(vehicles), tmp_path / "one").classes == ["plane", "ship", "train"]
    lonely = lay(tmp_path / "lonely", {"train/1.png": picture(1), "train/2.png": picture(2)})
    done = pack(str(lonely), tmp_path / "two")
    assert (done.classes, done.notes) == (None, ("took the split train",))


def test_linked_folders_are_followed_and_each_real_one_is_taken_once(tmp_path):
    elsewhere = lay(tmp_path / "elsewhere", {"1.png": picture(1), "deep/2.png": picture(2)})
    source = lay(tmp_path / "pets", {"cat/3.png": picture(3), "dog/4.png": picture(4)})
    (source / "cat/more").symlink_to(elsewhere)
    (source / "cat/again").symlink_to(elsewhere / "deep")
    (source / "cat/all").symlink_to(source)
    (source / "dog/up").symlink_to(tmp_path)
    (source / "dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    (source / "dog/5.png").symlink_to(elsewhere / "1.png")
    done = pack(str(source), tmp_path / "packed")
    taken = [sample["png"] for sample in samples_of(tmp_path / "packed/train")]
    assert sorted(taken) == sorted(picture(n) for n in (1, 1, 2, 3, 4))  # a linked file is a file
    assert {(one.name, one.kind, one.reason) for one in done.left_out} == {
        ("cat/all", "linked folder", "taken elsewhere"),
        ("cat/more/deep", "linked folder", "taken elsewhere"),
        ("dog/up", "linked folder", "around the source"),
        ("dog/gone.png", ".png", "broken link"),
    }
    (source / "hound").symlink_to(source / "dog")
    with pytest.raises(UserError, match=r"the class folder .*/hound is linked to another class folder; remove one"):
        pack(str(source), tmp_path / "other")


def test_mostly_loose_pictures_beside_a_folder_are_neither_dropped_nor_guessed_at(tmp_path):
    source = lay(tmp_path / "flat", {f"{i}.png": picture(i) for i in range(3)} | {"edited/1.png": picture(9)})
    message = r"flat holds 3 pictures beside folders with 1 \(edited\); move the folders away for pictures without"
    with pytest.raises(UserError, match=message):
        pack(str(source), tmp_path / "packed")


def test_folders_without_a_picture_say_what_they_hold(tmp_path):
    for name, message in (
        ("a.txt", r"holds no .jpg, .jpeg, .png or .webp files, but 1 .txt \(no picture\): a.txt"),
        ("photo.heic", r"holds no .* but 1 .heic \(not JPEG, PNG or WebP; convert it\): photo.heic"),
        ("x-000000.tar", r"holds .tar files; if they are shards, `dtrain index .*` makes their manifest"),
        ("data-00000-of-00001.arrow", r"holds Arrow files of `save_to_disk`; write them with `Dataset.to_parquet`"),
        ("photos.zip", r"holds .zip files and no pictures; unpack them first"),
    ):
        source = lay(tmp_path / name.replace(".", "_"), {name: b"x"})
        with pytest.raises(UserError, match=message):
            pack(str(source), tmp_path / "packed")
    lay(tmp_path / "bad", {"1.jpg": b"x", "2.jpg": b"y"})
    with pytest.raises(UserError, match=r"no sample of .*bad is left to train on: .* 2 .jpg \(not JPEG"):
        pack(str(tmp_path / "bad"), tmp_path / "packed")
    lay(tmp_path / "bad", {"3.png": picture(3)})
    with pytest.raises(UserError, match=r"see that more than the 2 of --holdout are fit; left out were 2 .jpg"):
        pack(str(tmp_path / "bad"), tmp_path / "packed", holdout=2)
    with pytest.raises(
        UserError, match=r"photos.zip cannot be packed; SOURCE is a folder of pictures, or of class folders"
    ):
        pack(str(tmp_path / "photos_zip/photos.zip"), tmp_path / "packed")
    with pytest.raises(UserError, match=r"bad/packed lies in .*bad, where it would be packed the next time"):
        pack(str(tmp_path / "bad"), tmp_path / "bad/packed")
    with pytest.raises(UserError, match=r"--root means nothing for .*bad; leave it away"):
        pack(str(tmp_path / "bad"), tmp_path / "packed", choice=Choice(root="data"))
    assert not (tmp_path / "packed").exists()
    assert not (tmp_path / ".packed.partial").exists()


def test_what_is_no_file_is_said_and_not_waited_for(tmp_path):
    source = lay(tmp_path / "flat", {"1.png": picture(1)})
    os.mkfifo(source / "2.png")
    done = pack(str(source), tmp_path / "packed")
    assert [(one.name, one.reason) for one in done.left_out] == [("2.png", "no file")]


def test_a_file_that_cannot_be_read_ends_it_and_is_not_taken_for_an_unfit_picture(tmp_path, monkeypatch):
    """It may be readable tomorrow. Here it goes away after it was listed."""
    source = lay(tmp_path / "flat", {f"{i}.png": picture(i) for i in range(3)})
    monkeypatch.setattr(writing, "PIECE", 1)
    with pytest.raises(
        UserError, match=r"cannot read .*flat/\d.png: No such file or directory; restore it, or take it"
    ):
        pack(str(source), tmp_path / "packed", progress=lambda *_: shutil.rmtree(source, ignore_errors=True))
    assert sorted(f.name for f in tmp_path.iterdir()) == []


MANY = {"holdout": 40, "seed": 4, "shard_samples": 9}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """240 pictures of which every third or so is cut off, packed without a disturbance."""
    folder = tmp_path_factory.mktemp("mixed")
    cut = np.random.default_rng(0).random(240) < 0.3
    files = {f"{i % 3}/{i:03d}.png": picture(i)[: 60 if cut[i] else None] for i in range(240)}
    lay(folder / "source", files)
    pack(str(folder / "source"), folder / "one", **MANY, processes=1)
    return folder, {name for name, bad in zip(files, cut, strict=True) if not bad}


def test_the_holdout_is_as_large_as_asked_and_what_is_unfit_changes_no_other_samples_order(mixed, tmp_path):
    """Against the order of the same folder with each unfit picture replaced by a fit one."""
    folder, fit = mixed
    assert set(packed_names(folder / "one", folder / "source")) == fit
    assert load(folder / "one/holdout/manifest.json").samples == 40
    shutil.copytree(folder / "source", tmp_path / "whole")
    for file in (tmp_path / "whole").rglob("*.png"):
        if file.stat().st_size == 60:
            file.write_bytes(picture(1000 + int(file.stem)))
    pack(str(tmp_path / "whole"), tmp_path / "packed", **MANY)
    kept = {(folder / "source" / name).read_bytes() for name in fit}
    orders = []
    for packed in (folder / "one", tmp_path / "packed"):
        samples = samples_of(packed / "holdout") + samples_of(packed / "train")
        orders.append([s["png"] for s in samples if s["png"] in kept])
    assert orders[0] == orders[1]


def test_any_number_of_processes_leaves_out_the_same_and_progress_reaches_all(mixed, tmp_path):
    folder, _ = mixed
    seen = []
    options = MANY | {"holdout": 0}
    pack(str(folder / "source"), tmp_path / "one", **options, processes=1)
    pack(str(folder / "source"), tmp_path / "two", **options, processes=2, progress=lambda *done: seen.append(done))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert seen[-1] == (240, 240)
    assert all(a < b for (a, _), (b, _) in pairwise(seen))


def _pack_slowly(folder, destination) -> None:
    os.setpgrp()
    pack(str(folder / "source"), destination, **MANY, processes=1, progress=lambda *_: time.sleep(0.002))


def test_a_kill_loses_nothing_of_what_was_left_out(mixed, tmp_path):
    folder, _ = mixed
    rng = np.random.default_rng(1)
    had = 0
    for _ in range(5):
        process = multiprocessing.get_context("fork").Process(target=_pack_slowly, args=(folder, tmp_path / "killed"))
        process.start()
        while len(shards_in(tmp_path / ".killed.partial")) < had + rng.integers(1, 5) and process.is_alive():
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert not (tmp_path / "killed").exists()
        had = len(shards_in(tmp_path / ".killed.partial"))
    assert had >= 5
    pack(str(folder / "source"), tmp_path / "killed", **MANY)
    assert contents(tmp_path / "killed") == contents(folder / "one")


def test_a_flat_folder_trains_without_labels_each_picture_once_an_epoch(flat, tmp_path):
    pack(str(flat), tmp_path / "packed")
    config = configuration(tmp_path / "packed/train", batch_size=3, num_classes=0)
    batches = train_batches(config, load(tmp_path / "packed/train/manifest.json"), 0, 1, 0)
    batch = [next(batches) for _ in range(3)]
    batches.close()
    images = torch.cat([b["image"] for b in batch])  # (9, 3, 8, 8)
    expected = torch.stack([Crop(8).of(data, 3) for data in FIT.values()])
    sums = [sorted(x.double().sum((1, 2, 3)).tolist()) for x in (images, expected)]
    assert sums[0] == pytest.approx(sums[1])
