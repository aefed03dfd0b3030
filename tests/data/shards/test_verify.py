"""Damaged shards of every kind, made from a seed: `verify` finds and names each, and a run loses no good sample."""

import io
import os
import resource
import tarfile
from collections import Counter

import numpy as np
import pytest

from dtrain.data.shards.indexing import index, index_shards
from dtrain.data.shards.manifest import check_all, load, load_all
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.verify import verify
from dtrain.data.stream import StepDataset
from dtrain.errors import BadSample, UserError
from tests.data.shard_files import configuration, data_set, labelled_pictures

KINDS = ("truncated", "flipped", "missing", "empty", "swapped", "duplicated", "longer", "zeroed")
SAMPLES = 8  # a shard


def members_of(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def damage(path, other: bytes, kind: str, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        data = data[: rng.integers(1, len(data))]
    elif kind == "flipped":
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    elif kind == "missing":
        return path.unlink()
    elif kind == "empty":
        data = b""
    elif kind == "swapped":
        data = other
    elif kind == "duplicated":
        members = members_of(bytes(data))
        members[-1] = (members[0][0], members[-1][1])  # the last member takes the first one's name
        data = tar_of(members)
    elif kind == "longer":
        data += bytes(int(rng.integers(1, 2000)))
    elif kind == "zeroed":
        start = int(rng.integers(len(data) - 2048))
        if not any(data[start : start + 700]):
            start = 0
        data[start : start + 700] = bytes(700)
    path.write_bytes(data)
    return None


def campaign(folder, shards: int, seed: int) -> None:
    """`shards` damaged ones among as many whole ones."""
    rng = np.random.default_rng(seed)
    manifest = data_set(folder, labelled_pictures(2 * shards * SAMPLES, size=6), SAMPLES)
    names = [s.name for s in manifest.shards]
    whole = {name: (folder / name).read_bytes() for name in names}
    bad = sorted(rng.choice(2 * shards, shards, replace=False).tolist())
    kinds = {n: KINDS[i % len(KINDS)] for i, n in enumerate(bad)}
    for n, kind in kinds.items():
        damage(folder / names[n], whole[names[n - 1]], kind, rng)
    changed = {n for n in bad if not (p := folder / names[n]).exists() or p.read_bytes() != whole[names[n]]}
    assert changed == set(bad)

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = verify(manifest, folder)
    assert list(problems) == [str(folder / names[n]) for n in bad]
    for n, kind in kinds.items():
        words = {"missing": "is missing", "empty": "(empty)", "truncated": "shorter", "longer": "longer"}
        assert words.get(kind, "") in problems[str(folder / names[n])]

    # Every member is delivered with exactly its bytes, or refused: nothing else, and what is whole is never refused.
    reader = ShardReader(manifest, folder)
    refused = Counter()
    for n, name in enumerate(names):
        members = iter([data for _, data in members_of(whole[name])])
        now = (folder / name).read_bytes() if (folder / name).exists() else b""
        for sample in range(n * SAMPLES, (n + 1) * SAMPLES):
            record = manifest.members[sample]
            expected = [next(members) for _ in manifest.fields]
            intact = all(now[o : o + s] == data for (o, s, _), data in zip(record.tolist(), expected, strict=True))
            try:
                assert list(reader.read(sample).values()) == expected
                assert intact
            except BadSample:
                assert not intact
                refused[kinds[n]] += 1
    assert set(refused) >= {"missing", "empty", "truncated"}
    assert "longer" not in refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 * 1024  # KiB


def test_every_damaged_shard_is_found_and_no_good_sample_is_lost(tmp_path):
    """500 damaged shards of 8 kinds, seed 7; DTRAIN_CAMPAIGN_SHARDS and DTRAIN_CAMPAIGN_SEED choose others."""
    shards, seed = (int(os.environ.get(f"DTRAIN_CAMPAIGN_{n}", d)) for n, d in (("SHARDS", 500), ("SEED", 7)))
    campaign(tmp_path, shards, seed)


def test_several_processes_find_what_one_finds(tmp_path):
    manifest = data_set(tmp_path, labelled_pictures(40), 4)
    (tmp_path / "train-000003.tar").write_bytes((tmp_path / "train-000004.tar").read_bytes())
    done = []
    found = verify(manifest, tmp_path, done.append, processes=2)
    assert found == verify(manifest, tmp_path)
    assert found == {
        f"{tmp_path}/train-000003.tar": "is another shard: it holds what the manifest says of train-000004.tar"
    }
    assert sum(done) == sum(s.bytes for s in manifest.shards)


def test_a_damaged_member_is_named(tmp_path):
    manifest = data_set(tmp_path, labelled_pictures(10), 5)
    path = tmp_path / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[int(manifest.members[7]["offset"][manifest.fields.index("png")]) + 20] ^= 1
    path.write_bytes(data)
    (problem,) = verify(manifest, tmp_path).values()
    assert problem.startswith("differs from its manifest in png of sample 2;")


def test_a_damaged_member_of_a_remote_shard_is_named_and_no_whole_one(tmp_path):
    """Members of 900 kB, of which some lie across the ends of the ranges that are fetched."""
    noise = np.random.default_rng(0)
    samples = [{"png": noise.bytes(900_000), "cls": b"0"} for _ in range(20)]
    manifest = data_set(tmp_path, samples, 20)
    path = tmp_path / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[int(manifest.members[15]["offset"][manifest.fields.index("png")]) + 20] ^= 1
    path.write_bytes(data)
    (problem,) = verify(manifest, f"file://{tmp_path}").values()
    assert problem.startswith("differs from its manifest in png of sample 15"), problem


def replacing(folder, **data):
    return configuration(folder, 8, on_error="replace", streams=2, shuffle_window=7, **data)


def test_a_bad_sample_gives_way_to_another_of_its_stream_and_all_others_stay(tmp_path):
    pictures = labelled_pictures(40)
    data_set(tmp_path / "whole", pictures)
    for bad, fields in {5: {"png": b"hello"}, 11: {"cls": b"99"}, 23: {"cls": b"x"}, 30: {"png": b""}}.items():
        pictures[bad] = pictures[bad] | fields
    manifest = data_set(tmp_path / "bad", pictures)
    whole = StepDataset(replacing(tmp_path / "whole"), load(tmp_path / "whole/manifest.json"), 0, 1, 0)
    seen, replaced = [], []
    for world_size in (1, 2, 4):
        rows = {}
        own = []
        for rank in range(world_size):
            dataset = StepDataset(replacing(tmp_path / "bad"), manifest, rank, world_size, 0)
            for index_ in range(10):
                batch = dataset[index_]
                rows |= {int(k): batch["image"][row] for row, k in enumerate(batch["k"])}
                own += dataset.take_report().replaced
        seen.append(rows)
        replaced.append(sorted(own, key=lambda r: r.k))
    assert replaced[0] == replaced[1] == replaced[2]  # whoever reads it finds the same substitute
    assert {r.sample for r in replaced[0]} == {5, 11, 23, 30}
    assert not {r.substitute for r in replaced[0]} & {5, 11, 23, 30}
    stream_length, order = 20, dataset._order.orders[0]
    for one in replaced[0]:
        epoch, stream = one.k // 40, one.k % 2
        positions = (epoch * stream_length + np.arange(stream_length)) * 2 + stream
        assert one.substitute in order.sample(positions)
    bad = {r.k for r in replaced[0]}
    for index_ in range(10):
        batch = whole[index_]
        for row, k in enumerate(batch["k"].tolist()):
            assert all(np.array_equal(rows[k], seen[0][k]) for rows in seen)
            if k not in bad:
                assert np.array_equal(batch["image"][row], seen[0][k])


def test_a_stream_without_a_whole_sample_ends_the_run(tmp_path):
    manifest = data_set(tmp_path, [{"png": b"x", "cls": b"0"} for _ in range(20)])
    with pytest.raises(UserError, match=r"png is not a JPEG.*; 64 substitutes of its stream cannot be used either"):
        StepDataset(replacing(tmp_path), manifest, 0, 1, 0)[0]


def test_a_lost_shard_is_replaced_only_where_so_many_samples_may_be_bad(tmp_path):
    manifest = data_set(tmp_path, labelled_pictures(40))
    (tmp_path / "train-000002.tar").unlink()
    for config in (configuration(tmp_path), replacing(tmp_path, max_bad_fraction=0.2)):
        with pytest.raises(UserError, match=r"cannot find the shard .*train-000002.tar"):
            check_all(manifest, config.data)
    config = replacing(tmp_path, max_bad_fraction=0.25)
    check_all(load_all(config.data), config.data)
    dataset = StepDataset(config, manifest, 0, 1, 0)
    for step in range(5):
        dataset[step]
    assert {r.sample for r in dataset.take_report().replaced} == set(range(20, 30))


def test_a_disk_that_fails_is_never_replaced(tmp_path):
    manifest = data_set(tmp_path, labelled_pictures(20))
    (tmp_path / "train-000001.tar").unlink()
    (tmp_path / "train-000001.tar").mkdir()  # opens, and every read is an error
    dataset = StepDataset(configuration(tmp_path, 20, on_error="replace"), manifest, 0, 1, 0)
    with pytest.raises(UserError, match=r"cannot read the shard .*: Is a directory") as error:
        dataset[0]
    assert not isinstance(error.value, BadSample)


def test_an_interrupted_index_goes_on_where_it_was(tmp_path):
    shards = data_set(tmp_path, labelled_pictures(40)).shards
    before = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").unlink()
    last = tmp_path / shards[-1].name
    whole = last.read_bytes()
    last.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"train-000003.tar"):
        index(str(tmp_path))
    parts = sorted((tmp_path / ".manifest.json.partial").glob("*.scan"))
    assert len(parts) == 3
    times = [p.stat().st_mtime_ns for p in parts]
    last.write_bytes(whole)
    seen = []
    paths = [tmp_path / s.name for s in shards]

    def look(done: int) -> None:
        seen.append([p.stat().st_mtime_ns for p in parts])

    index_shards(paths, tmp_path / "manifest.json", look, processes=2)
    assert seen == [times] * 4
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert not (tmp_path / ".manifest.json.partial").exists()


def test_a_list_names_shards(tmp_path):
    data_set(tmp_path, labelled_pictures(30))
    lines = ["# two of them", f"{tmp_path}/train-000002.tar", "", f"{tmp_path}/train-00000{{0..0}}.tar"]
    (tmp_path / "list").write_text("\n".join(lines))
    manifest = index([f"@{tmp_path}/list"], tmp_path / "two.json")
    assert [s.name for s in manifest.shards] == ["train-000002.tar", "train-000000.tar"]
