"""Indexing many shards, with kills on the way: what was scanned is not scanned again, and the manifest is the same."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from dtrain.data.shards import indexing
from dtrain.data.shards.indexing import find_shards, index_shards
from dtrain.data.shards.manifest import load
from dtrain.data.shards.tar import scan
from dtrain.errors import UserError
from tests.data.shard_files import write_shards

SHARDS = int(os.environ.get("DTRAIN_CAMPAIGN_INDEX", "160"))
KILLS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Real ones of 3 samples each, no two alike."""
    samples = [{"jpg": b"%d" % n * (n % 50), "cls": str(n % 10).encode()} for n in range(3 * SHARDS)]
    return write_shards(tmp_path_factory.mktemp("many"), samples, 3)


def _index(shards, destination) -> None:
    """In a process group of its own, so that its workers die with it as a job's do."""
    os.setpgrp()
    index_shards(shards, destination, progress=lambda _: time.sleep(0.001), processes=2)


def test_indexing_that_was_killed_goes_on_where_it_was(shards, tmp_path):
    """SIGKILL at random moments; the files are those of an uninterrupted call, byte for byte."""
    (tmp_path / "whole").mkdir()
    whole = index_shards(shards, tmp_path / "whole" / "manifest.json", processes=1)
    assert len(whole.shards) == SHARDS
    (tmp_path / "killed").mkdir()
    destination = tmp_path / "killed" / "manifest.json"
    kept: dict[str, int] = {}
    rng = np.random.default_rng(3)
    for round in range(1, KILLS + 1):
        process = multiprocessing.get_context("fork").Process(target=_index, args=(shards, destination))
        process.start()
        until = round * SHARDS // (KILLS + 1) + int(rng.integers(5))
        while len(parts := list((tmp_path / "killed").glob(".manifest.json.partial/*.scan"))) < until:
            assert process.is_alive()
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        now = {part.name: part.stat().st_ino for part in parts}
        assert now.items() >= kept.items()
        assert not destination.exists()
        kept = now
    again = index_shards(shards, destination, processes=2)
    assert again.hash == whole.hash
    for name in ("manifest.json", "manifest.members"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(f.name for f in (tmp_path / "killed").iterdir()) == ["manifest.json", "manifest.members"]
    last = scan(shards[-1])
    assert np.array_equal(load(destination).members[-3:], last.members[:, np.argsort(last.fields)])


@pytest.mark.parametrize("left", [b"", b'{"fields": ["cls"', b'{"fields": ["cls"], "samples": 3}\n123'])
def test_what_a_power_cut_left_of_a_scan_is_scanned_again(shards, tmp_path, left):
    whole = index_shards(shards[:2], tmp_path / "whole" / "manifest.json")
    destination = tmp_path / "cut" / "manifest.json"
    folder = destination.with_name(".manifest.json.partial")
    folder.mkdir(parents=True)
    for shard in shards[:2]:
        name, _ = indexing._scan_once(str(shard), str(folder))
        Path(name).write_bytes(left)
    assert index_shards(shards[:2], destination).hash == whole.hash


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("@{shard}", "cannot read the list of shards .*: 'utf-8' codec can't decode"),
        ("@{list}", "names another, @.*; write a path or URL a line"),
        ("x-{{000..099}}" + "y" * 300, "there is no shard"),
    ],
)
def test_what_names_no_shards_is_one_line(tmp_path, source, message):
    (tmp_path / "list").write_text(f"@{tmp_path}/list\n")
    (tmp_path / "shard").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=message):
        find_shards(source.format(shard=tmp_path / "shard", list=tmp_path / "list"))


@pytest.mark.parametrize("name", ["set[1]", "[ab]", "a{b,c}", "half{open", "what?", "st*r", "{000..003}"])
def test_a_folder_is_meant_as_it_is_written_whatever_is_in_its_name(tmp_path, name):
    shards = [tmp_path / name / f"x-{n}.tar" for n in range(3)]
    for place in (tmp_path / name, tmp_path / "set1", tmp_path / "a"):
        place.mkdir()
        for shard in shards:
            (place / shard.name).touch()
    assert find_shards(f"{tmp_path}/{name}") == shards
    assert find_shards(f"{tmp_path}/{name}/*.tar") == shards
    assert find_shards(f"{tmp_path}/{name}/x-[02].tar") == [shards[0], shards[2]]
    assert find_shards(f"{tmp_path}/{name}/x-{{1..2}}.tar") == shards[1:]
    assert find_shards(f"{tmp_path}/{name}/x-1.tar") == [shards[1]]


def test_brackets_still_choose_among_folders_where_none_has_them_in_its_name(tmp_path):
    for name in ("set1", "set2", "set3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.tar").touch()
    assert find_shards(f"{tmp_path}/set[12]/*.tar") == [tmp_path / "set1/x.tar", tmp_path / "set2/x.tar"]
    assert find_shards(f"{tmp_path}/set{{3,1}}/*.tar") == [tmp_path / "set3/x.tar", tmp_path / "set1/x.tar"]
