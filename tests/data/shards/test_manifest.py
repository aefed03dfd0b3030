"""Manifests: what they say, how they are refused when something is wrong, and how `index` finds its shards."""

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dtrain.data.shards.indexing import find_shards, index, index_shards
from dtrain.data.shards.manifest import RECORD, Shard, check_shards, load
from dtrain.data.shards.members import open_members
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.tar import ABSENT, scan
from dtrain.errors import UserError
from tests.data.shard_files import data_set, labelled_pictures, write_shards


@pytest.fixture
def folder(tmp_path):
    data_set(tmp_path / "data", labelled_pictures(25))
    return tmp_path / "data"


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_manifest_says_what_the_shards_hold(folder):
    manifest = load(folder / "manifest.json")
    shards = sorted(folder.glob("*.tar"))
    assert [s.name for s in manifest.shards] == [s.name for s in shards]
    assert [s.sha256 for s in manifest.shards] == [hashlib.sha256(s.read_bytes()).hexdigest() for s in shards]
    assert [s.bytes for s in manifest.shards] == [s.stat().st_size for s in shards]
    assert manifest.shard_sizes.tolist() == [10, 10, 5]
    assert manifest.samples == 25
    assert manifest.fields == ["cls", "png"]
    assert np.array_equal(manifest.members, np.concatenate([scan(s).members for s in shards]))


def test_the_side_file_takes_16_bytes_a_member_and_is_mapped(folder):
    manifest = load(folder / "manifest.json")
    assert (folder / "manifest.members").stat().st_size == 16 * 25 * 2
    assert isinstance(manifest.members, np.memmap)
    assert not manifest.members.flags.writeable
    record = (folder / "manifest.members").read_bytes()[16:32]  # the second field of the first sample
    offset, size = int.from_bytes(record[:8], "little"), int.from_bytes(record[8:12], "little")
    data = (folder / "train-000000.tar").read_bytes()
    assert data[offset : offset + size] == labelled_pictures(1)[0]["png"]


def test_fields_of_all_shards_share_one_table(tmp_path):
    write_shards(tmp_path, [{"jpg": b"a"}, {"cls": b"1", "jpg": b"b"}, {"txt": b"t"}], shard_samples=1)
    manifest = index(str(tmp_path))
    assert manifest.fields == ["cls", "jpg", "txt"]
    assert (manifest.members["size"] != ABSENT).tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_the_hash_names_the_data_not_its_place(tmp_path):
    one = data_set(tmp_path / "one", labelled_pictures(25))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "train-000000.tar").rename(tmp_path / "two" / "a-renamed.tar")
    assert index(str(tmp_path / "two")).hash == one.hash
    (tmp_path / "two" / "a-renamed.tar").rename(tmp_path / "two" / "z-last.tar")
    assert index(str(tmp_path / "two")).hash != one.hash  # another order is another data set
    pixels = labelled_pictures(25)
    pixels[7]["png"] = pixels[8]["png"]
    assert data_set(tmp_path / "three", pixels).hash != one.hash
    names = index_shards(sorted((tmp_path / "one").glob("*.tar")), tmp_path / "named.json", classes=["a", "b", "c"])
    assert names.hash != one.hash
    assert load(tmp_path / "named.json").classes == ["a", "b", "c"]


def test_folders_globs_and_brace_patterns_find_the_same_shards(folder, tmp_path):
    shards = sorted(folder.glob("*.tar"))
    assert find_shards(str(folder)) == shards
    assert find_shards(f"{folder}/train-*.tar") == shards
    assert find_shards(f"{folder}/train-{{000000..000002}}.tar") == shards
    assert find_shards(f"{folder}/train-00000{{2,0}}.tar") == [shards[2], shards[0]]
    shutil.copytree(folder, tmp_path / "more")
    both = index(f"{tmp_path}/{{data,more}}/train-000001.tar")
    assert both.path == tmp_path / "manifest.json"
    assert [s.name for s in both.shards] == ["data/train-000001.tar", "more/train-000001.tar"]


def test_the_manifest_goes_where_it_is_told(folder, tmp_path):
    (tmp_path / "out").mkdir()
    beside = load(folder / "manifest.json")
    for destination, path in [("out", "out/manifest.json"), ("new/digits.json", "new/digits.json")]:
        manifest = index(str(folder), tmp_path / destination)
        assert manifest.path == tmp_path / path
        assert manifest.hash == beside.hash
        check_shards(manifest, folder)


def test_indexing_again_keeps_the_class_names(folder):
    before = index_shards(sorted(folder.glob("*.tar")), folder / "manifest.json", classes=["a", "b", "c"])
    (folder / "manifest.members").unlink()
    again = index(str(folder))
    assert again.classes == ["a", "b", "c"]
    assert again.hash == before.hash


def test_sources_without_shards_are_refused_by_name(tmp_path):
    assert f"there are no *.tar files in {tmp_path}" in refusal(index, str(tmp_path))
    assert "there is no shard nowhere/x-1.tar" in refusal(index, "nowhere/x-{1..3}.tar")
    assert "there is no shard nowhere/*.tar" in refusal(index, "nowhere/*.tar")
    assert "do not balance" in refusal(index, "x-{000..")
    path = write_shards(tmp_path, [{"jpg": b""}])[0]
    assert f"{path} is named twice" in refusal(index, f"{path.parent}/train-{{000000,*}}.tar")


def test_a_damaged_shard_leaves_the_old_manifest_as_it_was(folder):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with open(folder / "train-000001.tar", "r+b") as file:
        file.truncate(5000)
    assert "train-000001.tar is not a whole uncompressed tar file" in refusal(index, str(folder))
    assert {f.name for f in folder.iterdir() if not f.name.startswith(".")} == set(before)
    assert load(folder / "manifest.json").samples == 25


def _index_without_privileges(folder: str, sender) -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        index(folder)
        sender.send("no error")
    except UserError as e:
        sender.send(str(e))


def test_a_folder_one_may_not_write_to_asks_for_another_place():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders are closed to other users
        write_shards(Path(folder), [{"jpg": b""}])
        os.chmod(folder, 0o555)
        receiver, sender = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=_index_without_privileges, args=(folder, sender))
        process.start()
        message = receiver.recv()
        process.join()
        os.chmod(folder, 0o755)
    assert message.startswith(f"cannot write {folder}/manifest")
    assert "--out" in message


def _edited(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "there is no manifest .*; `dtrain index SHARDS` makes it"),
        (lambda f: (f / "manifest.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "is not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is not a manifest"),
        (lambda f: _edited(f, format=2), "has format 2, this version reads 1"),
        (lambda f: _edited(f, shards=[]), r"is not a manifest \(shards: "),
        (lambda f: _edited(f, shards=[{"name": "x.tar", "samples": "3"}]), r"is not a manifest \(shards.0.samples: "),
        (lambda f: _edited(f, fields=["png"]), "manifest.members has 800 bytes, .* asks for 400"),
        (lambda f: (f / "manifest.members").unlink(), "cannot read .*manifest.members, which"),
        (lambda f: (f / "manifest.members").write_bytes(bytes(799)), "has 799 bytes, .* asks for 800"),
        (lambda f: (f / "manifest.members").write_bytes(bytes(800)), "is damaged or does not belong to"),
    ],
)
def test_a_damaged_manifest_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load(folder / "manifest.json")
    assert "dtrain index" in str(error.value)
    assert "\n" not in str(error.value)


def _load_and_count(path: str, cache: str, barrier, results) -> None:
    """Put (bytes that loading has read, whether it says that no sample lacks a field) into `results`."""

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    os.environ["XDG_CACHE_HOME"] = cache
    barrier.wait()
    before = read()
    complete = load(path).complete
    results.put((read() - before, complete))


def _large(folder: Path, lacking: bool) -> Path:
    """A manifest of a million samples whose shards are not there, and its side file of 16 MB."""
    members = np.zeros((1 << 20) + 1, dtype=RECORD)
    if lacking:
        members["size"][5] = ABSENT
    shard = {"name": "a.tar", "samples": len(members), "bytes": 512, "sha256": "0" * 64}
    side = {"file": "manifest.members", "sha256": hashlib.sha256(members.tobytes()).hexdigest()}
    (folder / "manifest.members").write_bytes(members.tobytes())
    document = {"format": 1, "fields": ["jpg"], "shards": [shard], "classes": None, "members": side}
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder / "manifest.json"


@pytest.mark.parametrize("lacking", [False, True])
def test_processes_of_a_node_hash_a_large_side_file_once_and_later_ones_not_at_all(tmp_path, lacking):
    path, context = _large(tmp_path, lacking), multiprocessing.get_context("fork")
    size = (tmp_path / "manifest.members").stat().st_size

    def started(count: int) -> list[tuple[int, bool]]:
        barrier, results = context.Barrier(count), context.Queue()
        arguments = (str(path), str(tmp_path / "cache"), barrier, results)
        processes = [context.Process(target=_load_and_count, args=arguments) for _ in range(count)]
        for process in processes:
            process.start()
        found = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        return found

    assert sorted((read >= size, complete) for read, complete in started(4)) == [
        *[(False, not lacking)] * 3,
        (True, not lacking),
    ]
    assert [(read >= size, complete) for read, complete in started(1)] == [(False, not lacking)]
    with (tmp_path / "manifest.members").open("r+b") as side:  # another file now, to the note and to its manifest
        side.write(b"x")
    with pytest.raises(UserError, match="damaged or does not belong"):
        load(path)


def test_a_sample_beyond_2_to_the_32_is_read_where_the_side_file_says(tmp_path):
    """Of a side file with a hole of 69 GB before its last records: only what is asked for is read."""
    write_shards(tmp_path, labelled_pictures(3))
    small = index(str(tmp_path), tmp_path / "small.json")
    before = Shard(name="before.tar", samples=2**32, bytes=1, sha256="0" * 64)
    side = tmp_path / "large.members"
    with side.open("wb") as file:
        file.seek(2**32 * len(small.fields) * small.members.itemsize)
        file.write(small.side.read_bytes())
    large = replace(small, shards=[before, *small.shards], side=side)
    assert large.samples == 2**32 + 3
    reader = ShardReader(large, tmp_path)
    for number in range(3):
        assert reader.read(2**32 + number) == ShardReader(small, tmp_path).read(number)
        with open_members(large, tmp_path) as ours, open_members(small, tmp_path) as theirs:
            assert ours.of(2**32 + number) == theirs.of(number)


def test_shards_that_are_missing_or_of_another_size_are_named(folder):
    manifest = load(folder / "manifest.json")
    check_shards(manifest, folder)
    path = folder / "train-000001.tar"
    size = path.stat().st_size
    os.truncate(path, size - 1234)
    expected = f"{path} is 1,234 bytes shorter than its manifest says; restore it or run `dtrain index` again"
    assert refusal(check_shards, manifest, folder) == expected
    os.truncate(path, size + 1)
    assert f"{path} is 1 bytes longer" in refusal(check_shards, manifest, folder)
    path.unlink()
    assert f"cannot find the shard {path} of {manifest.path}: No such file" in refusal(check_shards, manifest, folder)


def test_indexing_and_ordering_need_no_torch():
    code = "import sys, dtrain.data.shards.manifest, dtrain.data.order.order; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
