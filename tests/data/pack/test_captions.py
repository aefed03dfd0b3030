"""Captions that are packed with their pictures: of .txt files beside them, of a table, of pairs of digits."""

import csv

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dtrain.data.pack.digit_pairs import caption, is_held_out, pairs
from dtrain.data.pack.pack import pack
from dtrain.data.pack.source import Choice
from dtrain.data.shards.manifest import load
from dtrain.errors import UserError
from tests.data.shard_files import data_set, picture, samples_of


def lay(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def captions_in(folder):
    """png bytes → caption."""
    return {sample["png"]: sample["txt"].decode() for sample in samples_of(folder / "train")}


def test_a_text_of_its_name_is_a_pictures_caption(tmp_path):
    files = {f"{name}/{i}.png": picture(10 * i + len(name)) for name in ("cat", "bird") for i in range(3)}
    words = {"cat/0.txt": "a grey cat\n", "cat/1.txt": "", "bird/0.txt": "ein Vögelchen", "bird/2.txt": "a bird"}
    other = {"notes.txt": b"x", "cat/7.txt": b"of no picture"}
    folder = lay(tmp_path / "pets", files | {name: text.encode() for name, text in words.items()} | other)
    done = pack(str(folder), tmp_path / "packed", choice=Choice(captions=True))
    expected = {data: words.get(name.replace(".png", ".txt"), "").strip() for name, data in files.items()}
    assert captions_in(tmp_path / "packed") == expected
    assert all("cls" in sample for sample in samples_of(tmp_path / "packed/train"))
    assert sorted(one.name for one in done.left_out) == sorted(other)
    assert "captions: 4; 2 without, empty" in done.report
    # Without the option they are what they were.
    plain = pack(str(folder), tmp_path / "plain")
    assert len(plain.left_out) == len(words) + len(other)
    assert all(set(sample) == {"png", "cls"} for sample in samples_of(tmp_path / "plain/train"))


@pytest.mark.parametrize("form", ["metadata.csv", "metadata.jsonl"])
def test_a_column_of_a_table_holds_captions_with_or_without_labels(tmp_path, form):
    import json

    rows = [{"file_name": f"{i}.png", "text": f"picture, number {i}"} for i in range(4)]
    folder = lay(tmp_path / "flat", {f"{i}.png": picture(i) for i in range(5)})
    if form.endswith("csv"):
        with open(folder / form, "w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        (folder / form).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(str(folder), tmp_path / "packed", choice=Choice(caption_column="text"))
    expected = {picture(i): f"picture, number {i}" for i in range(4)} | {picture(4): ""}
    assert captions_in(tmp_path / "packed") == expected


@pytest.mark.parametrize(
    ("files", "choice", "problem"),
    [
        ({}, Choice(captions=True), r"no picture in .* has a .txt of its name beside it"),
        ({"0.txt": b"\xff"}, Choice(captions=True), r"0.txt is not UTF-8 at byte 0"),
        ({}, Choice(caption_column="text"), r"no metadata.jsonl or metadata.csv in .* --caption-column"),
        ({"metadata.csv": b"file_name,words\n0.png,a\n"}, Choice(caption_column="text"), "has no column text"),
        ({"metadata.jsonl": b'{"file_name": "0.png", "text": 3}'}, Choice(caption_column="text"), "is 3, no text"),
        ({}, Choice(captions=True, caption_column="text"), "give one of them"),
    ],
)
def test_captions_that_are_not_there_are_one_line(tmp_path, files, choice, problem):
    folder = lay(tmp_path / "flat", {"0.png": picture(0)} | files)
    with pytest.raises(UserError, match=problem):
        pack(str(folder), tmp_path / "packed", choice=choice)


def test_pairs_of_digits_are_what_their_captions_say_and_those_held_out_are_never_trained_on():
    from dtrain.data.pack.sources import open_source

    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    of_pixels = {image.tobytes(): int(label) for image, label in zip(levels, digits.target, strict=True)}
    assert len(pairs("train")) == 80
    assert len(pairs("test")) == 20
    assert sorted(pairs("train") + pairs("test")) == [(a, b) for a in range(10) for b in range(10)]
    for digit in range(10):  # each is held out twice on either side, so that nothing about it alone is new
        assert sum(is_held_out(digit, other) for other in range(10)) == 2
        assert sum(is_held_out(other, digit) for other in range(10)) == 2
    for split in ("train", "test"):
        source = open_source("sklearn:digit-pairs", Choice(split=split))
        assert source.samples == 100 * len(pairs(split))
        seen = set()
        for i in range(0, source.samples, 37):
            pixels, _, words = source.item(i)
            left, right = (of_pixels[np.ascontiguousarray(pixels[4:12, at : at + 8]).tobytes()] for at in (0, 8))
            assert words == caption(left, right)
            assert not pixels[:4].any()
            assert not pixels[12:].any()
            seen.add((left, right))
        assert seen <= set(pairs(split))


def test_captions_of_the_class_by_a_template(tmp_path):
    """Of a source with names of its classes, and of shards that have none; a sample without a class has no words."""
    folder = lay(
        tmp_path / "pets",
        {f"{name}/{i}.png": picture(10 * i + len(name)) for name in ("cat", "bird") for i in range(3)},
    )
    pack(str(folder), tmp_path / "packed", choice=Choice(caption_template="a photo of one {class}"))
    told = {sample["png"]: (sample["cls"], sample["txt"]) for sample in samples_of(tmp_path / "packed/train")}
    for number, name in enumerate(("bird", "cat")):
        for i in range(3):
            assert told[picture(10 * i + len(name))] == (b"%d" % number, f"a photo of one {name}".encode())
    (tmp_path / "plain").mkdir()
    samples = [{"png": picture(0), "cls": b"1"}, {"png": picture(1)}, {"png": picture(2), "cls": b"0"}]
    data_set(tmp_path / "plain", samples)
    report = pack(str(tmp_path / "plain" / "manifest.json"), tmp_path / "numbered").report
    assert "classes: the numbers in .cls, as the source had them, without names" in report
    choice = Choice(caption_template="{class}, {class}!", class_names="a dog, a cow")
    pack(str(tmp_path / "plain" / "manifest.json"), tmp_path / "named", choice=choice)
    said = [sample["txt"].decode() for sample in sorted(samples_of(tmp_path / "named/train"), key=lambda s: s["png"])]
    in_order = sorted(zip((s["png"] for s in samples), ("a cow, a cow!", "", "a dog, a dog!"), strict=True))
    assert said == [words for _, words in in_order]
    assert load(tmp_path / "named" / "train" / "manifest.json").classes == ["a dog", "a cow"]
    named = str(tmp_path / "named" / "train" / "manifest.json")
    for source, given, words in (
        (str(folder), {"caption_template": "a photo"}, r"has no \{class\}, which stands for the name"),
        (str(folder), {"class_names": "x,y"}, "the classes have names already: bird, cat"),
        (str(folder), {"caption_template": "{class}", "captions": True}, "leave --captions and --caption-column away"),
        (str(tmp_path / "plain/manifest.json"), {"caption_template": "{class}"}, "give them by --class-names"),
        (str(tmp_path / "plain/manifest.json"), {"class_names": "x,x"}, "each class needs a name of its own"),
        (
            str(tmp_path / "plain/manifest.json"),
            {"class_names": "x", "caption_template": "{class}"},
            "the class 1, and there are 1",
        ),
        (named, {"caption_template": "{class}"}, "the samples have captions already"),
    ):
        with pytest.raises(UserError, match=words):
            pack(source, tmp_path / "refused", choice=Choice(**given))
