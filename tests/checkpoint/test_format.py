import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dtrain.checkpoint import format
from dtrain.checkpoint.directory import complete, remove_partial, surplus
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.checkpoint.index import pieces_of
from dtrain.checkpoint.writer import Writer
from tests.checkpoint.written import Piece, save


@st.composite
def worlds(draw):
    """Tensors and a way of cutting each over 1 to 4 ranks."""
    sizes = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=4))
    ranks = draw(st.integers(1, 4))
    cuts = [{} for _ in range(ranks)]
    for i, size in enumerate(sizes):
        edges = sorted([0, *draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1)), size])
        for rank in range(ranks):
            cuts[rank][f"t{i}:fp32"] = (edges[rank], edges[rank + 1])
    return sizes, cuts


@settings(max_examples=40, deadline=None)
@given(world=worlds(), block=st.sampled_from([256, 1000, 4096]), data=st.data())
def test_any_slice_reads_back_however_the_tensors_were_cut(tmp_path_factory, world, block, data):
    sizes, cuts = world
    tensors = {
        f"t{i}:fp32": np.random.default_rng(i).standard_normal(n).astype(np.float32) for i, n in enumerate(sizes)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(format, "BLOCK", block)
        checkpoint = Checkpoint.open(save(tmp_path_factory.mktemp("c"), tensors, cuts))
    wanted, expected = [], []
    for name, values in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), values)
        start = data.draw(st.integers(0, len(values)))
        stop = data.draw(st.integers(start, len(values)))
        wanted.append((name, start, np.full(stop - start, np.nan, np.float32)))
        expected.append(values[start:stop])
    checkpoint.read_into(wanted)
    for (_, _, got), want in zip(wanted, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    checkpoint.verify()


def small(tmp_path, step=1):
    rng = np.random.default_rng(0)
    tensors = {
        "a:fp32": rng.standard_normal(900).astype(np.float32),
        "b:ema_0": rng.standard_normal(77).astype(np.float32),
    }
    cuts = [{"a:fp32": (0, 500), "b:ema_0": (0, 77)}, {"a:fp32": (500, 900), "b:ema_0": (77, 77)}]
    return save(tmp_path, tensors, cuts, step), tensors


def test_the_files_are_safetensors_that_the_library_reads(tmp_path):
    path, tensors = small(tmp_path)
    first = load_file(path / "rank-00000.safetensors")
    second = load_file(path / "rank-00001.safetensors")
    np.testing.assert_array_equal(first["a:fp32@0"], tensors["a:fp32"][:500])
    np.testing.assert_array_equal(second["a:fp32@500"], tensors["a:fp32"][500:])
    np.testing.assert_array_equal(first["b:ema_0@0"], tensors["b:ema_0"])


def read_all(path):
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def test_every_damage_is_found_before_a_value_is_used(tmp_path):
    """Flips, truncations, deletions, exchanges and stale files at random places: each must raise Damaged."""
    path, _ = small(tmp_path / "whole")
    rng = np.random.default_rng(1)
    files = sorted(p.name for p in path.iterdir())
    assert files == [
        "manifest.json",
        "rank-00000.json",
        "rank-00000.safetensors",
        "rank-00001.json",
        "rank-00001.safetensors",
    ]
    for trial in range(200):
        copy = tmp_path / f"trial-{trial}"
        shutil.copytree(path, copy)
        victim = copy / files[rng.integers(len(files))]
        data = bytearray(victim.read_bytes())
        kind = ["flip", "truncate", "delete", "exchange", "stale", "grow"][trial % 6]
        if kind == "flip":
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            victim.write_bytes(data)
        elif kind == "truncate":
            victim.write_bytes(data[: rng.integers(len(data))])
        elif kind == "grow":
            victim.write_bytes(data + bytes(rng.integers(1, 50)))
        elif kind == "delete":
            victim.unlink()
        elif kind == "exchange":
            suffix = ["json", "safetensors"][rng.integers(2)]
            one, two = copy / f"rank-00000.{suffix}", copy / f"rank-00001.{suffix}"
            a, b = one.read_bytes(), two.read_bytes()
            one.write_bytes(b)
            two.write_bytes(a)
        else:
            victim = copy / ["rank-00000.json", "rank-00001.json"][trial % 2]
            body = json.loads(victim.read_bytes())
            body["pieces"][0][3] += 4  # an index of other bytes, well formed
            victim.write_text(json.dumps(body))
        try:
            read_all(copy)
        except Damaged:
            pass
        else:
            pytest.fail(f"trial {trial}: {kind} of {victim.name} went unseen")
        shutil.rmtree(copy)


def test_a_pickle_in_place_of_any_file_runs_nothing(tmp_path):
    path, _ = small(tmp_path / "c")
    proof = tmp_path / "ran"
    evil = f"cposix\nsystem\n(S'touch {proof}'\ntR.".encode()
    for name in [p.name for p in path.iterdir()]:
        original = (path / name).read_bytes()
        (path / name).write_bytes(evil)
        with pytest.raises(Damaged):
            read_all(path)
        (path / name).write_bytes(original)
    assert not proof.exists()


def rewrite_manifest(path, change) -> None:
    """With a hash of its own that fits."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest.pop("sha256")
    change(manifest)
    (path / "manifest.json").write_text(json.dumps({"sha256": format._hash(manifest), **manifest}))


def as_before(manifest: dict) -> None:
    """Without what a manifest did not say of all indexes together when it named them alone."""
    del manifest["ranges"], manifest["bytes"]


def test_an_index_with_a_matching_hash_but_a_missing_piece_is_damage(tmp_path):
    path, _ = small(tmp_path)
    index = json.loads((path / "rank-00001.json").read_bytes())
    index["pieces"] = []
    (path / "rank-00001.json").write_text(json.dumps(index))
    digest = hashlib.sha256((path / "rank-00001.json").read_bytes()).hexdigest()
    rewrite_manifest(path, lambda manifest: manifest["indexes"].update({"rank-00001.json": digest}))
    for read in (Checkpoint.verify, lambda checkpoint: checkpoint.tensor("a:fp32")):
        with pytest.raises(Damaged, match="the index of rank 1 has other pieces than the manifest says"):
            read(Checkpoint.open(path))
    rewrite_manifest(path, as_before)
    with pytest.raises(Damaged, match="elements 500… of a:fp32 are missing"):
        Checkpoint.open(path)


@settings(max_examples=40, deadline=None)
@given(world=worlds())
def test_a_checkpoint_whose_manifest_names_its_indexes_alone_reads_the_same(tmp_path_factory, world):
    sizes, cuts = world
    tensors = {f"t{i}:fp32": np.arange(n, dtype=np.float32) + i for i, n in enumerate(sizes)}
    path = save(tmp_path_factory.mktemp("c"), tensors, cuts)
    now = Checkpoint.open(path)
    runs, held = now._runs, [pieces_of(now._runs, rank) for rank in range(len(cuts))]
    assert held == [sorted((n, a, b - a) for n, (a, b) in cut.items() if b > a) for cut in cuts]
    rewrite_manifest(path, as_before)
    before = Checkpoint.open(path)
    assert (before._runs, before.bytes, before.files) == (runs, now.bytes, now.files)
    for name, values in tensors.items():
        np.testing.assert_array_equal(now.tensor(name), values)
        np.testing.assert_array_equal(before.tensor(name), values)


def test_a_share_needs_the_manifest_and_its_own_ranks_files_alone(tmp_path):
    """As at stage 3: each of many ranks has a piece of every tensor, and the manifest a few numbers of all of them."""
    ranks, sizes = 64, {f"t{i}:fp32": 6400 + 64 * i + i % 3 for i in range(5)}
    tensors = {
        n: np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, (n, s) in enumerate(sizes.items())
    }
    share = {name: -(-size // ranks) for name, size in sizes.items()}
    cuts = [{n: (min(r * share[n], s), min((r + 1) * share[n], s)) for n, s in sizes.items()} for r in range(ranks)]
    path = save(tmp_path, tensors, cuts)
    assert max(map(len, json.loads((path / "manifest.json").read_bytes())["ranges"].values())) <= 2
    for file in [*path.glob("rank-*.json"), *path.glob("rank-*.safetensors")]:
        if file.stem not in ("rank-00020", "rank-00021"):
            file.unlink()
    with pytest.raises(Damaged, match=r"rank-00000\.safetensors"):
        Checkpoint.open(path)
    wanted = [(n, 20 * s + s // 2, np.empty(s, np.float32)) for n, s in share.items()]  # half of each of two ranks'
    Checkpoint.open(path, all_files=False).read_into(wanted)
    for name, start, got in wanted:
        np.testing.assert_array_equal(got, tensors[name][start : start + len(got)])
    with pytest.raises(Damaged, match="rank-00022"):
        Checkpoint.open(path, all_files=False).read_into(
            [(n, 22 * s, np.empty(1, np.float32)) for n, s in share.items()]
        )


def test_a_manifest_keeps_no_more_runs_than_pay(tmp_path, monkeypatch):
    monkeypatch.setattr(format, "MOST_RUNS", 2)
    path, tensors = small(tmp_path)
    assert "ranges" not in json.loads((path / "manifest.json").read_bytes())
    np.testing.assert_array_equal(Checkpoint.open(path).tensor("a:fp32"), tensors["a:fp32"])


def test_a_later_save_of_other_pieces_is_told_from_the_one_before(tmp_path):
    writer = Writer(tmp_path, 0, 1)
    for step, sizes in enumerate(((5, 3), (5, 3), (2, 9)), start=1):
        tensors = {
            name: torch.arange(float(step), step + n) for name, n in zip(("a:fp32", "b:fp32"), sizes, strict=True)
        }
        writer.begin(step, [Piece(n, 0, v) for n, v in tensors.items()], {n: len(v) for n, v in tensors.items()}, {})
        writer.wait()
        found = Checkpoint.open(writer.commit())
        assert {name: found.tensor(name).tolist() for name in tensors} == {n: v.tolist() for n, v in tensors.items()}


def test_a_name_is_complete_only_after_every_rank_has_written(tmp_path):
    writers = [Writer(tmp_path, rank, 2) for rank in range(2)]
    values = torch.arange(10.0)
    writers[0].begin(5, [Piece("a:fp32", 0, values[:5])], {"a:fp32": 10}, {"step": 5})
    writers[0].wait()
    assert writers[0].written
    assert not writers[1].written
    assert complete(tmp_path) == []
    with pytest.raises(Damaged, match=r"rank-00001.json: No such file"):
        writers[0].commit()
    assert complete(tmp_path) == []
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_changes_after_the_copy_does_not_reach_the_checkpoint(tmp_path):
    writer = Writer(tmp_path, 0, 1)
    values = torch.zeros(2_000_000)
    for step in (1, 2):
        values.fill_(step)
        writer.begin(step, [Piece("a:fp32", 0, values)], {"a:fp32": len(values)}, {"step": step})
        values.fill_(-1.0)
        writer.wait()
        path = writer.commit()
        assert (Checkpoint.open(path).tensor("a:fp32") == step).all()


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    writer = Writer(tmp_path, 0, 1)
    for value in (1.0, 2.0):
        writer.begin(3, [Piece("a:fp32", 0, torch.full((3,), value))], {"a:fp32": 3}, {"step": 3})
        writer.wait()
        path = writer.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    assert (Checkpoint.open(path).tensor("a:fp32") == 2).all()


@given(
    steps=st.lists(st.integers(1, 60), min_size=1, unique=True),
    keep_last=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 20),
    best=st.none() | st.integers(1, 60),
)
def test_the_newest_the_milestones_and_the_best_stay(steps, keep_last, keep_every, best):
    gone = surplus(steps, keep_last, keep_every, best)
    kept = set(steps) - set(gone)
    assert max(steps) in kept
    assert len(kept) >= min(keep_last, len(steps))
    for step in gone:
        assert step != best
        assert keep_every is None or step % keep_every
        assert sum(s > step for s in steps) >= keep_last
    if keep_every is None and best is None:
        assert len(kept) == min(keep_last, len(steps))


def test_a_writer_that_dies_of_something_else_than_the_disk_has_not_written(tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError("2 GiB")

    monkeypatch.setattr(format, "write_file", no_memory)
    writer = Writer(tmp_path, 0, 1)
    writer.begin(1, [Piece("a:fp32", 0, torch.zeros(3))], {"a:fp32": 3}, {"step": 1})
    writer.wait()
    assert not writer.written
    assert "MemoryError: 2 GiB" in writer.failure


def test_a_place_that_cannot_be_written_is_a_failure_of_that_save_only(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    writer = Writer(blocked, 0, 1)
    writer.begin(1, [Piece("a:fp32", 0, torch.zeros(3))], {"a:fp32": 3}, {"step": 1})
    writer.wait()
    assert not writer.written
    assert "cannot write" in writer.failure
    writer.abandon()
    assert writer.step is None
