"""What a run journals about its data, what an audit makes of it, and that too much damage ends every rank."""

import json
from pathlib import Path

import pytest

from dtrain.config import validate
from dtrain.data.bench import bench, report
from dtrain.errors import UserError
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events, read
from dtrain.training.audit import audit
from tests.data.shard_files import data_set, labelled_pictures, short_run
from tests.ranks import run_ranks


def _train(plain: dict) -> str:
    from dtrain.training.run_training import train

    try:
        return train(validate(plain, "a test"))
    except UserError as e:
        return str(e)


def journals(run: Path) -> list[dict]:
    files = [run / "journal.jsonl", *sorted(run.glob("journal-rank-*.jsonl"))]
    return [line | {"file": f.name} for f in files for line in events(f)]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A run of 9 steps on two ranks, then of 6 more on one in batches of 12, over samples of which 3 are bad."""
    folder = tmp_path_factory.mktemp("damaged")
    pictures = labelled_pictures(60)
    for bad in (7, 20, 41):
        pictures[bad]["png"] = b"broken"
    data_set(folder / "data", pictures)
    assert run_ranks(_train, 2, short_run(folder, 9, max_bad_fraction=0.2)) == ["finished"] * 2
    assert run_ranks(_train, 1, short_run(folder, 15, batch_size=12, max_bad_fraction=0.2)) == ["finished"]
    return folder


def test_bad_samples_are_counted_and_named_by_the_rank_that_met_them(damaged):
    run = damaged / "runs" / "run"
    lines = journals(run)
    bad = [line for line in lines if line["event"] == "bad_sample"]
    assert {line["context"]["sample"] for line in bad} == {7, 20, 41}
    assert all("png is not a JPEG" in line["context"]["problem"] for line in bad)
    assert all(line["images"] <= line["context"]["k"] < line["images"] + 12 for line in bad)
    assert {line["attempt"] for line in bad if line["file"] != "journal.jsonl"} == {1}
    steps = [line for line in read(run / "journal.jsonl") if line["event"] == "train"]
    assert sum(line["metrics"]["bad_samples"] for line in steps) == len(bad)
    assert all(line["metrics"]["bytes_read"] > 8 * 50 for line in steps)
    by_step = {line["step"]: line["metrics"]["bad_samples"] for line in steps}
    for line in bad:
        assert by_step[line["step"]] >= 1


def test_an_audit_proves_a_run_across_a_resize_and_denies_a_forged_journal(damaged, tmp_path):
    run = RunDirectory(damaged / "runs" / "run")
    found = audit(run)
    assert found.problems == []
    assert "144 images in 2 attempts" in str(found)
    assert "60 samples, each used 2 to 3 times" in str(found)
    assert "proven" in str(found)

    forged = tmp_path / "run"
    forged.mkdir()
    (forged / "config.yaml").write_bytes(run.config_file.read_bytes())
    lines = [json.loads(line) for line in run.journal_file.read_text().splitlines()]
    for line in lines:
        if line["event"] == "attempt" and line["attempt"] == 2:
            line["images"] += 12  # goes on 12 images too far: those between were never trained on
    (forged / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    denied = audit(RunDirectory(forged))
    assert denied.problems == ["attempt 2 goes on at image 84, but step 9 ended at 72"]
    assert str(denied).endswith("denied")


def test_too_many_bad_samples_end_every_rank_at_the_same_step(damaged, tmp_path):
    (tmp_path / "data").symlink_to(damaged / "data")
    first, second = run_ranks(_train, 2, short_run(tmp_path, 15, max_bad_fraction=0.03))
    assert first == second
    assert first.startswith(("2 bad", "3 bad"))  # a step may meet two of the three at once
    assert "bad samples of 60 images are more than data.max_bad_fraction 0.03 allows" in first


def test_a_mixture_counts_its_sources_in_the_journal(tmp_path):
    data_set(tmp_path / "data", labelled_pictures(40))
    data_set(tmp_path / "other", labelled_pictures(24))
    mix = [{"name": "other", "shards": str(tmp_path / "other"), "weight": 1.0}]
    assert run_ranks(_train, 1, short_run(tmp_path, 4, batch_size=32, mix=mix)) == ["finished"]
    run = RunDirectory(tmp_path / "runs" / "run")
    last = [line for line in read(run.journal_file) if line["event"] == "train"][-1]
    counts = {name: last["metrics"][f"images/{name}"] for name in ("main", "other")}
    assert sum(counts.values()) == 128
    assert all(40 < count < 90 for count in counts.values())
    found = audit(run)
    assert found.problems == []
    assert any(line.startswith("other: 24 samples") for line in found.lines)


def test_the_bench_measures_every_stage(tmp_path):
    data_set(tmp_path / "data", labelled_pictures(40))
    config = validate(short_run(tmp_path, 1, batch_size=4, on_error="raise"), "a test")
    rates = bench(config, seconds=0.1)
    assert list(rates) == ["read", "decode", "transform", "randomness", "collate", "pictures", "whole"]
    stages = {name: rate for name, rate in rates.items() if name not in ("pictures", "whole")}
    slowest = min(stages, key=stages.get)
    # Stages one after the other take as long as the whole, but for what lies between them.
    assert 1 / rates["whole"] > 0.3 * sum(1 / rate for rate in stages.values())
    assert rates["whole"] < 1.5 * rates["pictures"]  # which is a part of it
    assert report(rates).splitlines()[-1].startswith(f"{slowest} limits: ")
