"""Indexing tar files of every common writer, and refusing every tar that has lost something."""

import hashlib
import re
import subprocess
import tarfile
import zlib

import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from dtrain.data.shards.tar import ABSENT, member_name, scan, split_name
from dtrain.errors import UserError
from tests.data.shard_files import LONG_NAME, write_shards, write_tar


def contents(path, result):
    """(sample → field → bytes) as the index says, after checking every size and crc32 against the file."""
    data = path.read_bytes()
    samples = []
    for row in result.members:
        sample = {}
        for field, (offset, size, crc32) in zip(result.fields, row.tolist(), strict=True):
            if size != ABSENT:
                sample[field] = data[offset : offset + size]
                assert len(sample[field]) == size
                assert zlib.crc32(sample[field]) == crc32
        samples.append(sample)
    assert result.bytes == len(data)
    assert result.sha256 == hashlib.sha256(data).hexdigest()
    return samples


def as_webdataset_reads(path):
    """The same by webdataset's own reader."""
    pipeline = webdataset.WebDataset(str(path), shardshuffle=False, nodesplitter=None)
    return [{k: v for k, v in sample.items() if not k.startswith("__")} for sample in pipeline]


def test_shards_of_webdatasets_writer(tmp_path):
    samples = [{"jpg": b"j" * (i * 100), "cls": str(i).encode(), "json": b"{}"} for i in range(20)]
    for path, expected in zip(write_shards(tmp_path, samples), (samples[:10], samples[10:]), strict=True):
        assert contents(path, scan(path)) == expected == as_webdataset_reads(path)


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7"])
def test_shards_of_gnu_tar(tmp_path, form):
    deep = LONG_NAME if form in ("gnu", "pax") else "deep"
    names = [f"{folder}/{key}.{field}" for folder in ("a", deep) for key in ("x", "y") for field in ("CLS", "jpg")]
    for number, name in enumerate(names):
        file = tmp_path / "source" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([number]) * (number * 511))
    path = tmp_path / "shard.tar"
    command = ["tar", f"--format={form}", "-C", tmp_path / "source", "-cf", path, "--sort=name", "."]
    subprocess.run(command, check=True)
    result = scan(path)
    found = contents(path, result)
    assert len(found) == 4
    assert found == as_webdataset_reads(path)
    for row in result.members:
        name = member_name(path, int(row[0]["offset"]))
        assert name.removeprefix("./") in names


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_shards_of_pythons_tarfile(tmp_path, form):
    members = [(f"{LONG_NAME}/ключ-{i}.jpg", bytes([i]) * (1 + i * 700)) for i in range(5)]
    headers = {"comment": "a global header"} if form == tarfile.PAX_FORMAT else None
    path = write_tar(tmp_path / "shard.tar", members, form, headers)
    result = scan(path)
    assert contents(path, result) == [{"jpg": data} for _, data in members] == as_webdataset_reads(path)
    assert [member_name(path, int(row[0]["offset"])) for row in result.members] == [name for name, _ in members]


def test_members_of_a_sample_come_in_any_order_and_may_be_missing(tmp_path):
    members = [("a.cls", b"0"), ("a.jpg", b"A"), ("b.jpg", b""), ("c.jpg", b"C"), ("c.cls", b"2"), ("d.cls", b"3")]
    result = scan(write_tar(tmp_path / "shard.tar", members))
    assert result.fields == ["cls", "jpg"]
    assert contents(tmp_path / "shard.tar", result) == [
        {"cls": b"0", "jpg": b"A"},
        {"jpg": b""},
        {"jpg": b"C", "cls": b"2"},
        {"cls": b"3"},
    ]


@settings(max_examples=300, deadline=None)
@given(st.text("aB./_-ä ", min_size=1, max_size=14))
@example("./a/b.c/d.seg.PNG")
@example("a.b/c")
def test_names_are_split_as_webdataset_does(name):
    key, field = base_plus_ext(name)
    if key is not None and (key.endswith("/") or not field or re.match("__[^/]*__/", name)):
        key = None  # dot files in folders, names without an extension after the dot, and what its reader skips
    assert split_name(name) == (key and (key, field.lower()))


def test_what_webdataset_skips_is_skipped(tmp_path):
    members = [("__meta__/a.json", b"{}"), ("a.jpg", b"1"), ("README", b"r"), (".hidden.jpg", b"h"), ("b.jpg", b"2")]
    path = write_tar(tmp_path / "shard.tar", members)
    assert contents(path, scan(path)) == [{"jpg": b"1"}, {"jpg": b"2"}] == as_webdataset_reads(path)


def test_dot_files_in_folders_are_no_samples(tmp_path):
    """macOS adds such files to its tars; webdataset itself would join them under the key `a/`."""
    path = write_tar(tmp_path / "shard.tar", [("a/._1.jpg", b"x"), ("a/1.jpg", b"1"), ("a/.DS_Store", b"x")])
    assert contents(path, scan(path)) == [{"jpg": b"1"}]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b""), ("b.jpg", b""), ("a.cls", b"")], "members of sample 'a' in two places"),
        ([("a.jpg", b""), ("a.JPG", b"")], r"has two members a\.jpg"),
        ([("README", b"")], "has no samples"),
        ([], "has no samples"),
        ([(f"v1.{i}.jpg", b"") for i in range(70)], "more than 64 different extensions"),
    ],
)
def test_shards_that_are_no_samples_are_refused_by_name(tmp_path, members, message):
    path = write_tar(tmp_path / "shard.tar", members)
    with pytest.raises(UserError, match=message) as error:
        scan(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_with_a_line_break_does_not_break_the_line(tmp_path):
    members = [("a\n\udcff.jpg", b"1"), ("b.jpg", b"2"), ("a\n\udcff.png", b"3")]
    with pytest.raises(UserError, match=r"the second at a\\n\\udcff.png") as error:
        scan(write_tar(tmp_path / "shard.tar", members))
    assert str(error.value).isprintable()


def test_links_compressed_and_missing_shards_are_refused_by_name(tmp_path):
    linked = tmp_path / "linked.tar"
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "b.jpg").hardlink_to(tmp_path / "a.jpg")
    subprocess.run(["tar", "-C", tmp_path, "-cf", linked, "a.jpg", "b.jpg"], check=True)
    with pytest.raises(UserError, match=r"linked.tar: b.jpg is a link"):
        scan(linked)
    subprocess.run(["gzip", "-k", linked], check=True)
    with pytest.raises(UserError, match=r"linked.tar.gz is not a whole uncompressed tar file"):
        scan(tmp_path / "linked.tar.gz")
    with pytest.raises(UserError, match=r"cannot read the shard .*nothing.tar: No such file"):
        scan(tmp_path / "nothing.tar")


def test_two_tar_files_in_one_are_refused(tmp_path):
    first, second = (write_tar(tmp_path / f"{n}.tar", [(f"{n}.jpg", b"x")]) for n in "ab")
    both = tmp_path / "both.tar"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match=r"both.tar is damaged, or two tar files in one"):
        scan(both)
