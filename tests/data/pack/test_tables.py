"""Pictures with a table of labels: Hugging Face's `imagefolder` and Parquet files, written by pyarrow as it does."""

import csv
import io
import json
import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dtrain.data.pack.pack import pack
from dtrain.data.pack.source import Choice
from dtrain.data.shards.manifest import load
from dtrain.errors import UserError
from tests.data.pack.sources import lay, packed_names
from tests.data.shard_files import picture, samples_of
from tests.folders import contents

ANIMALS = ["cat", "dog", "hare"]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("labels", [["dog", "cat", "dog"], [2, 0, 2]])
def test_a_metadata_table_gives_the_labels(tmp_path, name, labels):
    rows = [{"file_name": f"deep/{i}.png", "label": label} for i, label in enumerate(labels)]
    rows.append({"file_name": "gone.png", "label": labels[0]})
    rows.append({"file_name": "1.jpg", "label": "" if name.endswith("csv") else None})
    files = {f"deep/{i}.png": picture(i) for i in range(3)} | {"1.jpg": picture(7), "2.jpg": picture(8)}
    source = lay(tmp_path / "source", files | {name: jsonl(rows) if name.endswith("l") else as_csv(rows)})
    done = pack(str(source), tmp_path / "packed")
    numbers = [1, 0, 1] if labels[0] == "dog" else labels
    assert done.classes == (["cat", "dog"] if labels[0] == "dog" else ["0", "1", "2"])
    assert packed_names(tmp_path / "packed", source) == {f"deep/{i}.png": n for i, n in enumerate(numbers)}
    assert {(one.name, one.reason) for one in done.left_out} == {
        ("1.jpg", f"no label in {name}"),
        ("2.jpg", f"no row in {name}"),
        ("gone.png", f"a row of {name} without a file"),
    }


def test_captions_are_no_labels_and_a_column_can_be_named(tmp_path):
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}", "kind": ANIMALS[i % 2]} for i in range(4)]
    source = lay(tmp_path / "source", {f"{i}.png": picture(i) for i in range(4)} | {"metadata.jsonl": jsonl(rows)})
    done = pack(str(source), tmp_path / "packed")
    assert done.classes is None
    assert done.notes == ("metadata.jsonl has no column label; `--label-column` takes another one of it: text, kind",)
    done = pack(str(source), tmp_path / "kinds", choice=Choice(label_column="kind"))
    assert done.classes == ["cat", "dog"]
    assert packed_names(tmp_path / "kinds", source) == {f"{i}.png": i % 2 for i in range(4)}
    with pytest.raises(UserError, match=r"has no column breed; besides file_name it has text, kind"):
        pack(str(source), tmp_path / "other", choice=Choice(label_column="breed"))


def test_labels_that_change_make_another_request(tmp_path):
    files = {f"{i}.png": picture(i) for i in range(4)}
    rows = [{"file_name": name, "label": n % 2} for n, name in enumerate(files)]
    source = lay(tmp_path / "source", files | {"metadata.jsonl": jsonl(rows)})
    pack(str(source), tmp_path / "packed")
    lay(source, {"metadata.jsonl": jsonl([rows[0] | {"label": 1}, *rows[1:]])})
    with pytest.raises(UserError, match=r"was packed from .* when that held other files"):
        pack(str(source), tmp_path / "packed")


@pytest.mark.parametrize("inside", [True, False])
def test_a_splits_table_lies_in_its_folder_or_in_the_one_around_it(tmp_path, inside):
    files, tables = {}, {}
    for split, count in (("train", 4), ("test", 2)):
        files |= {f"{split}/{i}.png": picture(hash((split == "test", i)) % 999) for i in range(count)}
        rows = [{"file_name": f"{i}.png" if inside else f"{split}/{i}.png", "label": i % 2} for i in range(count)]
        tables.setdefault(f"{split}/metadata.jsonl" if inside else "metadata.jsonl", []).extend(rows)
    source = lay(tmp_path / "source", files | {name: jsonl(rows) for name, rows in tables.items()})
    done = pack(str(source), tmp_path / "packed", choice=Choice(split="test"))
    assert packed_names(tmp_path / "packed", source) == {"test/0.png": 0, "test/1.png": 1}
    assert done.left_out == []


def test_damaged_tables_are_refused_by_line(tmp_path):
    for number, (text, message) in enumerate(
        (
            (b'{"file_name": "1.png", "label": 0}\nx\n', r"metadata.jsonl cannot be read"),
            (b"[1]\n", r"metadata.jsonl, line 1: this is no JSON object"),
            (b'{"file_name": "1.png", "label": 0.5}\n', r"has the label '0.5'; labels are all class numbers, or"),
            (
                b'{"file_name": "1.png", "label": 5}\n{"file_name": "2.png", "label": "cat"}\n',
                r"a mixture of texts and",
            ),
            (
                b'{"file_name": "1.png", "label": 123456789}\n',
                r"the label 123456789; class numbers go from 0 to 999,999",
            ),
            (b'{"file_name": "1.png", "label": "a\\nb"}\n', r"the class of .* has a name that cannot be kept"),
            (b'{"file_name": "9.png", "label": 0}\n', r"labels none of the 1 pictures; 1 .png \(a row of"),
        )
    ):
        source = lay(tmp_path / str(number), {"1.png": picture(1), "metadata.jsonl": text})
        with pytest.raises(UserError, match=message):
            pack(str(source), tmp_path / "packed")


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(
    path: Path, pictures: list[bytes | None], columns: dict[str, tuple[list, dict]], image: str = "image", **options
) -> Path:
    """As `datasets` writes: pictures as {bytes, path}, and what each column is in the schema's metadata."""
    features = {image: {"_type": "Image"}} | {name: feature for name, (_, feature) in columns.items()}
    values = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(pictures)]
    table = pa.table({image: pa.array(values, IMAGE)} | {name: pa.array(v) for name, (v, _) in columns.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(described), path, **options)
    return path


def class_label(names: list[str]) -> dict:
    return {"names": names, "_type": "ClassLabel"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two files of a training split, row groups that divide neither, and one of another split."""
    folder = tmp_path_factory.mktemp("exported") / "animals"
    for shard in range(2):
        pictures = [picture(100 * shard + i, 12, 3, ("PNG", "JPEG", "WEBP")[i % 3]) for i in range(50)]
        labels = [(shard + i) % 3 for i in range(50)]
        columns = {"label": (labels, class_label(ANIMALS))}
        write_parquet(folder / f"data/train-{shard:05d}-of-00002.parquet", pictures, columns, row_group_size=7)
    write_parquet(folder / "data/test-00000-of-00001.parquet", [picture(1)], {"label": ([-1], class_label(ANIMALS))})
    lay(folder, {"README.md": b"# animals"})
    return folder


def rows_of(packed: Path) -> dict[bytes, int]:
    samples = [s for split in ("train", "holdout") if (packed / split).exists() for s in samples_of(packed / split)]
    return {next(s[f] for f in ("jpg", "png", "webp") if f in s): int(s["cls"]) for s in samples}


def test_parquet_rows_are_packed_byte_for_byte_with_their_labels_and_class_names(exported, tmp_path):
    with pytest.raises(UserError, match=r"animals holds the splits test, train; choose one, such as `--split train`"):
        pack(str(exported), tmp_path / "packed")
    done = pack(str(exported), tmp_path / "packed", holdout=20, choice=Choice(split="train"))
    assert (done.train, done.holdout, done.classes) == (80, 20, ANIMALS)
    assert done.taken == {"jpg": 34, "png": 34, "webp": 32}
    expected = {}
    for path in sorted(exported.glob("data/train-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            expected[row["image"]["bytes"]] = row["label"]
    assert rows_of(tmp_path / "packed") == expected
    assert {f.name for f in (tmp_path / "packed").iterdir()} == {"train", "holdout", "pack.json"}


def test_one_parquet_file_with_rows_that_cannot_be_used(tmp_path):
    pictures = [picture(0), None, b"", picture(3)[:40], b"GIF89a", picture(5, 9, 3, "JPEG"), picture(6)]
    labels = [0, 1, 1, 1, 1, 2, None]
    path = write_parquet(tmp_path / "animals.parquet", pictures, {"label": (labels, class_label(ANIMALS))})
    done = pack(str(path), tmp_path / "packed")
    assert rows_of(tmp_path / "packed") == {pictures[0]: 0, pictures[5]: 2}
    assert sorted((one.name, one.reason) for one in done.left_out) == [
        ("animals.parquet, row 1", "no picture in the row"),
        ("animals.parquet, row 2", "no picture in the row"),
        ("animals.parquet, row 3", "truncated"),
        ("animals.parquet, row 4", "not JPEG, PNG or WebP inside"),
        ("animals.parquet, row 6", "no label"),
    ]
    assert "  2 rows (no picture in the row): animals.parquet, row" in done.report


def test_columns_are_chosen_by_name_where_there_are_several(tmp_path):
    columns = {
        "fine": ([0, 1, 2], class_label(ANIMALS)),
        "coarse": ([0, 0, 1], class_label(["small", "large"])),
        "mask": ([{"bytes": picture(50 + i), "path": None} for i in range(3)], {"_type": "Image"}),
    }
    path = write_parquet(tmp_path / "a.parquet", [picture(i) for i in range(3)], columns)
    with pytest.raises(UserError, match=r"several image columns, image, mask; choose one: `--image-column image`"):
        pack(str(path), tmp_path / "packed")
    with pytest.raises(UserError, match=r"several label columns, fine, coarse; choose one: `--label-column fine`"):
        pack(str(path), tmp_path / "packed", choice=Choice(image_column="mask"))
    done = pack(str(path), tmp_path / "packed", choice=Choice(image_column="mask", label_column="coarse"))
    assert done.classes == ["small", "large"]
    assert rows_of(tmp_path / "packed") == {picture(50): 0, picture(51): 0, picture(52): 1}
    with pytest.raises(UserError, match=r"was packed with label_column 'coarse', not 'fine'"):
        pack(str(path), tmp_path / "packed", choice=Choice(image_column="mask", label_column="fine"))
    with pytest.raises(UserError, match=r"has no column lable; its columns are image, fine, coarse, mask"):
        pack(str(path), tmp_path / "other", choice=Choice(image_column="mask", label_column="lable"))


def test_files_that_others_wrote_are_read_by_the_usual_names_and_types(tmp_path):
    pictures = [picture(i) for i in range(4)]
    table = pa.table({"id": [5, 6, 7, 8], "jpg": pa.array(pictures, pa.binary()), "label": ["b", "a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    done = pack(str(tmp_path / "a.parquet"), tmp_path / "one")
    assert done.classes == ["a", "b", "c"]
    assert rows_of(tmp_path / "one") == dict(zip(pictures, [1, 0, 1, 2], strict=True))
    pq.write_table(table.select(["id", "jpg"]), tmp_path / "b.parquet")
    assert pack(str(tmp_path / "b.parquet"), tmp_path / "two").classes is None
    assert load(tmp_path / "two/train/manifest.json").fields == ["png"]
    pq.write_table(table.select(["id"]), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet has no column of encoded images; its columns are id"):
        pack(str(tmp_path / "c.parquet"), tmp_path / "three")


def test_parquet_files_that_do_not_belong_together_are_refused(exported, tmp_path):
    for subset in ("plain", "augmented"):
        columns = {"label": ([0], class_label(ANIMALS))}
        write_parquet(tmp_path / f"subsets/{subset}/train/0000.parquet", [picture(1)], columns)
    with pytest.raises(UserError, match=r"holds several subsets: augmented, plain; give the folder of one of them"):
        pack(str(tmp_path / "subsets"), tmp_path / "packed")
    assert pack(str(tmp_path / "subsets/plain"), tmp_path / "plain").notes == ("took the split train",)
    columns = {"label": ([0], class_label(["dog", "cat"]))}
    write_parquet(tmp_path / "two/1.parquet", [picture(1)], columns)
    write_parquet(tmp_path / "two/2.parquet", [picture(1)], {"label": ([0], class_label(ANIMALS))})
    with pytest.raises(UserError, match=r"2.parquet has other columns or classes than .*1.parquet; pack them one by"):
        pack(str(tmp_path / "two"), tmp_path / "packed")
    with pytest.raises(UserError, match=r"has no split test; its Parquet files are of none"):
        pack(str(tmp_path / "two"), tmp_path / "packed", choice=Choice(split="test"))
    with pytest.raises(UserError, match=r"no sample of .* is left to train on: .* 1 rows \(no label\)"):
        pack(str(exported), tmp_path / "packed", choice=Choice(split="test"))
    lay(tmp_path, {"cut.parquet": (tmp_path / "two/1.parquet").read_bytes()[:-9]})
    with pytest.raises(UserError, match=r"cut.parquet is no Parquet file that can be read"):
        pack(str(tmp_path / "cut.parquet"), tmp_path / "packed")
    whole = bytearray((exported / "data/train-00000-of-00002.parquet").read_bytes())
    whole[len(whole) // 3 : len(whole) // 3 + 2000] = bytes(2000)
    lay(tmp_path, {"holed.parquet": bytes(whole)})
    with pytest.raises(UserError, match=r"holed.parquet: (row \d+ or after|the column label) cannot be read"):
        pack(str(tmp_path / "holed.parquet"), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def _pack_slowly(source, destination) -> None:
    os.setpgrp()
    pack(str(source), destination, choice=Choice(split="train"), progress=lambda *_: time.sleep(0.005))


def test_parquet_packing_that_was_killed_goes_on_and_ends_with_the_same_bytes(exported, tmp_path):
    """Also while the pictures are being copied."""
    seen = []
    choice = Choice(split="train")
    pack(str(exported), tmp_path / "one", choice=choice, progress=lambda *done: seen.append(done))
    assert seen[-1] == (200, 200)
    assert len(seen) > 100
    partial = tmp_path / ".two.partial"
    for wait in ("spool/pictures", "spool/pictures.npy", "train/train-000002.tar"):
        process = get_context("fork").Process(target=_pack_slowly, args=(exported, tmp_path / "two"))
        process.start()
        while not (partial / wait).exists() and process.is_alive():
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert partial.exists()
    pack(str(exported), tmp_path / "two", choice=choice)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_picture_of_a_table_is_the_one_that_training_reads(exported, tmp_path):
    """Shuffled rows keep their own pictures: each is decoded and compared with its row's."""
    pack(str(exported), tmp_path / "packed", choice=Choice(split="train"))
    rows = [row for path in sorted(exported.glob("data/train-*")) for row in pq.read_table(path).to_pylist()]
    keys = [line["__key__"] for line in _webdataset(tmp_path / "packed/train")]
    assert sorted(keys) == [f"{i:08d}" for i in range(100)]
    for sample in _webdataset(tmp_path / "packed/train"):
        data = next(sample[f] for f in ("jpg", "png", "webp") if f in sample)
        row = rows[int(sample["__key__"])]
        assert Image.open(io.BytesIO(data)).tobytes() == Image.open(io.BytesIO(row["image"]["bytes"])).tobytes()


def _webdataset(folder: Path):
    import webdataset

    shards = [str(s) for s in sorted(folder.glob("*.tar"))]
    return webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None)
