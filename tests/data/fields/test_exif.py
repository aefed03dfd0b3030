"""A photograph is trained on as a viewer shows it: turned as its EXIF orientation says, which Pillow is asked for."""

import io
import json
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dtrain.config import identity, load_kept
from dtrain.data.fields.exif import orientation
from dtrain.data.fields.headers import header
from dtrain.data.fields.picture import centre_crop, decode, normalize
from dtrain.data.fields.upright import any_turned
from dtrain.data.pack.pack import pack
from dtrain.data.shards.manifest import load
from dtrain.data.stream import Completion, StepDataset, read_split
from dtrain.errors import UserError
from dtrain.evaluation.metrics.statistics import read
from dtrain.evaluation.reference import Reference, make
from dtrain.report.neighbours import _held_out
from dtrain.training.check import check_start
from tests.data.shard_files import configuration, data_set
from tests.digits import tiny

ORIENTATION = 0x0112
FORMS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def pixels(number: int, width: int = 24, height: int = 16) -> Image.Image:
    """Smooth, so that a JPEG keeps it, and different at each corner."""
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 20 * number)], -1).astype(np.uint8))


def photograph(number: int, turned: int | None, form: str = "JPEG") -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x010F] = "a camera"  # another tag before it
    if turned is not None:
        exif[ORIENTATION] = turned
    pixels(number).save(file, form, exif=exif, **({"lossless": True} if form == "WEBP" else {"quality": 95}))
    return file.getvalue()


def as_viewers_show(data: bytes, mode: str = "RGB") -> np.ndarray:
    """int (C, H, W)."""
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode), dtype=int)
    return shown.transpose(2, 0, 1) if mode == "RGB" else shown[None]


@pytest.mark.parametrize("turned", [None, *range(10)])
@pytest.mark.parametrize("form", FORMS)
def test_every_orientation_is_what_pillow_makes_of_it(form, turned):
    data = photograph(1, turned, form)
    for channels, mode in ((3, "RGB"), (1, "L")):
        expected = as_viewers_show(data, mode)
        found = decode(data, channels)
        assert found.shape == expected.shape
        assert np.abs(found.numpy() - expected).max() <= 2
    stored = decode(data, 3, upright=False)
    assert torch.equal(stored, decode(photograph(1, None, form), 3))
    assert (header(data).width, header(data).height) == (24, 16)


def test_exif_data_behind_the_pixels_of_a_png_count_too():
    whole = photograph(1, 6, "PNG")
    at = whole.index(b"eXIf") - 4
    length = 12 + int.from_bytes(whole[at : at + 4], "big")
    moved = whole[:at] + whole[at + length : -12] + whole[at : at + length] + whole[-12:]
    assert np.array_equal(decode(moved, 3).numpy(), as_viewers_show(moved))
    assert decode(moved, 3).shape == (3, 24, 16)


@pytest.mark.parametrize("order", "<>")
def test_damaged_exif_data_say_what_pillow_reads_in_them_and_never_fail(order):
    """Where a damaged tag stands before the orientation Pillow gives up, and viewers and this do not."""
    entries = [(0x010F, 2, 4, b"cam\0"), (0x0112, 3, 1, struct.pack(order + "H2x", 6)), (0x0131, 2, 2, b"x\0\0\0")]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    whole = head + b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    assert orientation(whole) == orientation(b"Exif\0\0" + whole) == 6
    rng, agreed = np.random.default_rng(0), 0
    for _ in range(1500):
        data = bytearray(whole[: rng.integers(0, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for at in rng.integers(0, max(1, len(data)), rng.integers(0, 4)):
            data[at : at + 1] = bytes([rng.integers(256)])
        found, theirs = orientation(bytes(data)), Image.Exif()
        assert 1 <= found <= 8
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs.load(b"Exif\0\0" + bytes(data))
                expected = theirs.get(ORIENTATION)
        except Exception:  # not only SyntaxError, seen
            continue
        if expected in range(1, 9):
            assert found == expected, bytes(data)
            agreed += 1
    assert agreed > 300
    for value in range(256):  # the only damage is a value that means nothing
        data = whole.replace(struct.pack(order + "H2x", 6), struct.pack(order + "H2x", value))
        assert orientation(data) == (value if value in range(1, 9) else 1)


@pytest.fixture
def photographs(tmp_path):
    """Shards of 8 photographs in all orientations, packed as they are from a folder."""
    (tmp_path / "photos").mkdir()
    for turned in range(1, 9):
        (tmp_path / "photos" / f"{turned}.jpg").write_bytes(photograph(turned, turned))
    pack(str(tmp_path / "photos"), tmp_path / "packed", seed=3)
    return load(tmp_path / "packed/train/manifest.json")


def as_trained(manifest, **data) -> dict[int, torch.Tensor]:
    """Orientation → the picture of a batch, found by its blue."""
    config = configuration(manifest.path.parent, 8, num_classes=0, **data)
    batch = Completion(config)(StepDataset(config, manifest, 0, 1, 0)[0])["image"]
    return {round(float((image[2].mean() + 1) * 127.5 / 20)): image for image in batch}


def test_a_training_sees_packed_photographs_upright_and_as_stored_only_where_told(photographs, tmp_path):
    stored = {n: (tmp_path / "photos" / f"{n}.jpg").read_bytes() for n in range(1, 9)}
    for exif in ("apply", "ignore"):
        found = as_trained(photographs, exif=exif)
        for n, data in stored.items():
            expected = torch.from_numpy(as_viewers_show(data if exif == "apply" else photograph(n, None)))
            error = (found[n] - normalize(centre_crop(expected.to(torch.uint8), 8))).abs().max() * 127.5
            assert error <= 4
    assert not torch.equal(as_trained(photographs)[6], as_trained(photographs, exif="ignore")[6])


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_packing_in_another_format_turns_the_pixels_and_leaves_no_tag_to_turn_them_again(tmp_path, form):
    source = tmp_path / "photos"
    source.mkdir()
    other = "PNG" if form == "jpeg" else "JPEG"
    for turned in range(1, 9):
        (source / f"{turned}.{FORMS[other]}").write_bytes(photograph(turned, turned, other))
    shards = pack(str(source), tmp_path / "packed").destination / "train"
    for place, given in ((tmp_path / "again", source), (tmp_path / "from shards", shards / "manifest.json")):
        pack(str(given), place, format=form)
        manifest = load(place / "train/manifest.json")
        assert not any_turned(manifest, manifest.place)
        images, _ = read_split(manifest, manifest.place, 8, 3, 0, 8)
        originals, _ = read_split(load(shards / "manifest.json"), shards, 8, 3, 0, 8)

        def by_blue(images):
            return images[images[:, 2].double().mean((1, 2)).argsort()]

        assert (by_blue(images).int() - by_blue(originals).int()).abs().max() <= 8  # of 100 and more otherwise


def test_what_was_packed_in_another_format_before_is_kept_and_that_is_said(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.jpg").write_bytes(photograph(1, 6))
    arguments = (str(tmp_path / "photos"), tmp_path / "packed")
    pack(*arguments, format="png")
    assert "EXIF" not in pack(*arguments, format="png").report
    request = tmp_path / "packed/pack.json"
    tree = json.loads(request.read_text())
    assert tree.pop("exif") == "apply"
    request.write_text(json.dumps(tree))
    assert (
        "photographs taken upright may lie on their side; remove it to pack anew"
        in pack(*arguments, format="png").report
    )
    assert "exif" not in json.loads(
        (pack(str(tmp_path / "photos"), tmp_path / "same").destination / "pack.json").read_text()
    )


def test_a_run_is_bound_to_it_and_one_from_before_the_key_goes_on_as_it_was(photographs, tmp_path):
    config = configuration(photographs.path.parent, 8, num_classes=0)
    assert (config.data.exif, identity(config)["data.exif"]) == ("apply", "apply")
    before = config.dump().replace("  exif: apply\n", "")
    assert before != config.dump()
    (tmp_path / "config.yaml").write_text(before)
    assert load_kept(tmp_path / "config.yaml").data.exif == "ignore"


def test_the_check_says_how_many_are_turned(photographs):
    for exif, words in (("apply", "turned as their"), ("ignore", "not turned as their")):
        config = configuration(photographs.path.parent, 8, num_classes=0, exif=exif)
        assert f"7 of 8 images looked at: {words} EXIF orientation says" in check_start(config, 1)


def compared(holdout, folder, *overrides) -> Reference:
    place = f"data.holdout={holdout.path}"
    return Reference.open(
        tiny(folder, folder, place, "data.image_size=8", "data.channels=3", "model.num_classes=0", *overrides),
        torch.device("cpu"),
    )


def test_a_reference_is_another_one_where_pictures_are_turned_and_the_same_where_none_is(photographs, tmp_path):
    upright, stored = (compared(photographs, tmp_path, f"data.exif={exif}") for exif in ("apply", "ignore"))
    assert (upright.changed.upright, stored.changed.upright) == (True, False)
    assert not np.array_equal(upright.statistics.mean, stored.statistics.mean)
    for exif, expected in (("apply", upright), ("ignore", stored)):  # each again finds its own, though both are kept
        again = compared(photographs, tmp_path, f"data.exif={exif}")
        assert again.kept is None
        assert np.array_equal(again.statistics.mean, expected.statistics.mean)
        assert torch.equal(again.validation[0], expected.validation[0])
        config = tiny(tmp_path, tmp_path, f"data.holdout={photographs.path}", "data.channels=3", f"data.exif={exif}")
        assert torch.equal(normalize(_held_out(config.data, 8)), expected.validation[0])
    plain = data_set(tmp_path / "plain", [{"jpg": photograph(n, 1)} for n in range(8)])
    assert compared(plain, tmp_path, "data.exif=ignore").kept is not None
    assert compared(plain, tmp_path, "data.exif=apply").kept is None


def test_runs_that_turn_pictures_and_runs_that_do_not_have_each_a_reference_file_beside_one_split(
    photographs, tmp_path
):
    folder, files = photographs.path.parent, {}
    for exif in ("apply", "ignore"):
        files[exif] = make(str(folder), "pixels", None, 8, None, upright=exif == "apply").partition(": ")[0]
    assert files == {
        "apply": f"{folder}/reference-pixels-8px-upright-bicubic.npz",
        "ignore": f"{folder}/reference-pixels-8px-bicubic.npz",
    }
    for exif, file in files.items():  # neither has computed it anew
        found = compared(photographs, tmp_path, f"data.exif={exif}")
        assert (found.kept, found.statistics.mean.tolist()) == (None, read(file).statistics.mean.tolist())


def test_a_file_from_before_pictures_were_turned_serves_its_own_runs_and_stops_no_new_one(photographs, tmp_path):
    make(str(photographs.path.parent), "pixels", None, 8, None, upright=False)
    assert compared(photographs, tmp_path).kept is not None
    assert compared(photographs, tmp_path, "data.exif=ignore").kept is None


def test_a_named_reference_of_pictures_that_lay_otherwise_is_refused_with_the_command_that_makes_the_right_one(
    photographs, tmp_path
):
    folder = str(photographs.path.parent)
    for other, own, was in (("apply", "ignore", "turned upright, .*, is centre"), ("ignore", "apply", "centre")):
        file = make(folder, "pixels", None, 8, None, upright=other == "apply").partition(": ")[0]
        option = " --exif ignore" if own == "ignore" else ""
        fix = rf"run `dtrain reference {folder} --features pixels{option}` and name its file in eval\.reference"
        with pytest.raises(UserError, match=rf"is stale: its preprocessing was {was} .*; {fix}"):
            compared(photographs, tmp_path, f"data.exif={own}", f"eval.reference={file}")


def test_that_no_picture_is_turned_is_kept_only_where_all_could_be_read(photographs, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("dtrain.data.fields.upright._LONG", 0.0)  # as of a split that takes long
    whole = {shard: shard.read_bytes() for shard in photographs.path.parent.glob("*.tar")}
    for shard, data in whole.items():
        shard.write_bytes(data.replace(b"\xff\xd8\xff", b"bad"))  # where JPEG files begin
    assert not any_turned(photographs, photographs.place)
    for shard, data in whole.items():
        shard.write_bytes(data)
    assert any_turned(photographs, photographs.place)
    for shard in whole:
        shard.unlink()
    assert any_turned(photographs, photographs.place)  # this answer is kept

    plain = data_set(tmp_path / "plain", [{"jpg": photograph(n, 1)} for n in range(8)])
    assert not any_turned(plain, plain.place)
    for shard in (tmp_path / "plain").glob("*.tar"):
        shard.unlink()
    assert not any_turned(plain, plain.place)  # and so is this one
