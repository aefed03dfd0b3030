"""What `dtrain sample` writes: a folder of pictures, and arrays as ADM's evaluator reads them."""

import csv
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from dtrain.run import RunDirectory
from tests.command_line import command, failing
from tests.ranks import run_ranks
from tests.training.runs import copied

NAMES = ["nought", "one/two", *"23456789"]


@pytest.fixture(scope="module")
def run(digits, finished_run, tmp_path_factory):
    """A run whose classes have names."""
    folder = tmp_path_factory.mktemp("runs")
    named = folder / "manifest.json"
    source = digits / "train"
    named.write_text(json.dumps(json.loads((source / "manifest.json").read_text()) | {"classes": NAMES}))
    (folder / "manifest.members").write_bytes((source / "manifest.members").read_bytes())
    config = copied(finished_run, digits, folder, f"data.manifest={named}")
    return RunDirectory(config.run.path)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sampled(run, *arguments, world_size=1):
    code, said = run_ranks(command, world_size, "sample", run.path, *arguments)[0]
    assert code == 0, said
    return said


def test_a_folder_holds_a_picture_an_image_named_by_id_and_class(run, work):
    assert "30 images in pictures" in sampled(run, "-n", 30, "--steps", 3, "--out", "pictures/", world_size=2)
    sampled(run, "-n", 30, "--steps", 3, "--out", "all.npz")
    with np.load("all.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    with open("pictures/labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows[:3]] == ["000000-0-nought.png", "000001-1-one_two.png", "000002-2.png"]
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert rows[11]["class"] == "one/two"
    assert {p.name for p in (work / "pictures").iterdir()} == {row["file"] for row in rows} | {"labels.csv"}
    for row, image in zip(rows, images, strict=True):
        difference = np.asarray(Image.open(f"pictures/{row['file']}")).astype(int) - image[:, :, 0]
        assert np.abs(difference).max() <= 1  # drawn by two ranks, whose blocks may round otherwise


def test_adm_reads_the_arrays_it_looks_for(run, work):
    """As its evaluator does: the member arr_0 of the zip, (N, H, W, 3) uint8, read from a stream."""
    sampled(run, "-n", 14, "--steps", 3, "--out", "adm.npz", "--format", "adm")
    sampled(run, "-n", 14, "--steps", 3, "--out", "own.npz")
    with zipfile.ZipFile("adm.npz") as archive:
        assert archive.namelist() == ["arr_0.npy", "arr_1.npy"]
        with archive.open("arr_0.npy") as stream:
            assert np.lib.format.read_magic(stream) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            images = np.frombuffer(stream.read(), dtype).reshape(shape)
        labels = np.load(io.BytesIO(archive.read("arr_1.npy")))
    assert (shape, fortran, dtype) == ((14, 8, 8, 3), False, np.uint8)
    assert labels.dtype == np.int64
    with np.load("own.npz") as own:
        np.testing.assert_array_equal(images, own["images"].repeat(3, axis=3))
        np.testing.assert_array_equal(labels, own["labels"])


def test_places_that_do_not_fit_are_refused_before_anything_is_drawn(run, work):
    (work / "full").mkdir()
    (work / "full" / "photo.png").write_bytes(b"")
    (work / "file").write_bytes(b"")
    for arguments, message in (
        (["--out", "full"], "--out full holds something already"),
        (["--out", "file"], "--out file holds something already"),
        (["--out", "no/where"], f"there is no folder {work}/no"),
        (["--out", "x.jpg"], "must end in .png or .npz, or be a folder"),
        (["--out", "x.png", "--format", "adm"], "--out x.png must end in .npz for --format adm"),
        (["--out", "x.npz", "--format", "folder"], "--out x.npz is called like a file"),
        (["--out", "x", "--format", "gif"], "--format gif is not one of png, npz, adm, folder"),
    ):
        assert message in failing("sample", run.path, *arguments)
    assert {p.name for p in work.iterdir()} == {"full", "file"}
