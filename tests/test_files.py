"""FIFOs, links and expansions where files should be: nothing waits, nothing leads elsewhere, users' own links do."""

import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from dtrain import config as configuration
from dtrain import files
from dtrain.checkpoint.directory import complete, remove, remove_partial
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.cluster.status import known_runs, table
from dtrain.data.shards.indexing import index
from dtrain.data.shards.manifest import load
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.tar import MEMBER
from dtrain.data.shards.verify import verify
from dtrain.errors import BadSample, UserError
from dtrain.evaluation.metrics import statistics
from dtrain.evaluation.scratch import Scratch
from dtrain.lock import RunLock
from dtrain.report.pictures import grids
from dtrain.report.runs import read_runs
from dtrain.run import RunDirectory
from dtrain.tracking.journal import Journal, events
from tests.checkpoint.written import save
from tests.data.shard_files import data_set, labelled_pictures, rewrite_side
from tests.digits import losses, tiny
from tests.ranks import run_ranks
from tests.report.made import append, make_run
from tests.training.runs import train


@contextmanager
def within_seconds(seconds: float):
    """What is still waiting after them ends in an error."""

    def late(*_):
        raise AssertionError(f"it waited for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fifo_at(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """runs/ with the runs a and b; the current folder is the one that holds it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("a", "b"):
        make_run(tmp_path / "runs", monkeypatch, name)
    return tmp_path / "runs"


@pytest.mark.parametrize("name", ["journal.jsonl", "config.yaml", "outcome.json", "lock"])
def test_a_fifo_in_a_run_is_one_line_of_status_and_no_wait(runs, name):
    fifo_at(runs / "a" / name)
    with within_seconds(5):
        lines = table(known_runs([])).splitlines()
        shown = {line.split()[0]: line for line in lines}
        assert len(lines) == 3
        assert "finished" in shown["runs/b"]
        if name == "journal.jsonl":
            assert shown["runs/a"].split(maxsplit=1)[1] == (
                "not readable: runs/a/journal.jsonl is not a regular file; move it away"
            )
            with pytest.raises(UserError, match=r"journal\.jsonl is not a regular file"):
                read_runs([runs / "a"])
        elif name == "lock":
            with pytest.raises(UserError, match="does not tell who holds it"):
                RunLock(runs / "a" / "lock").acquire()


def test_a_reason_makes_no_column_wider(runs):
    fifo_at(runs / "a" / "journal.jsonl")
    lines = table(known_runs([])).splitlines()
    os.unlink(runs / "a" / "journal.jsonl")
    assert table(known_runs([])).splitlines()[0] == lines[0]


def test_fifos_in_a_data_set_are_refused_by_name(tmp_path):
    manifest = data_set(tmp_path, labelled_pictures(4))
    (shard,) = manifest.shards
    reader = ShardReader(manifest, tmp_path)
    fifo_at(tmp_path / shard.name)
    with within_seconds(10):
        with pytest.raises(UserError, match=f"{shard.name}: is not a regular file"):
            reader.read(0)
        with pytest.raises(UserError, match=f"{shard.name}: is not a regular file"):
            index(str(tmp_path), tmp_path / "again.json")
        with pytest.raises(UserError, match=f"{shard.name}: is not a regular file"):
            verify(manifest, tmp_path)
        for name in ("manifest.members", "manifest.json"):
            fifo_at(tmp_path / name)
            with pytest.raises(UserError, match=f"{name}.*is not a regular file"):
                load(tmp_path / "manifest.json")


def test_a_fifo_in_place_of_statistics_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    with within_seconds(5), pytest.raises(UserError, match="no statistics file"):
        statistics.read(tmp_path / "x.npz")


def test_a_small_file_of_many_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "outcome.json"
    path.touch()
    os.truncate(path, 1 << 40)  # a hole
    with within_seconds(5), pytest.raises(OSError, match="more than 1,048,576"):
        files.read_json(path)


def test_a_line_of_a_journal_without_an_end_costs_no_memory_and_no_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.begin_attempt(0, 0)
    with path.open("ab") as f:
        f.write(b'{"event": "' + b"x" * (40 << 20))
    journal.close()
    journal = Journal(path)
    journal.begin_attempt(3, 24)
    assert [line["step"] for line in events(path)] == [0, 3]


# Aliases


LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], y{n}: 1}}" for n in range(1, 10)]
)


@pytest.mark.parametrize("text", [LAUGHS, MERGES])
def test_ten_lines_that_mean_billions_of_values_are_refused_before_they_are_made(runs, text):
    path = runs / "a" / "config.yaml"
    path.write_text(f"{text}\n{path.read_text()}")
    with within_seconds(5):
        with pytest.raises(UserError, match="has more than 50,000 values with its aliases written out"):
            configuration.load(path)
        with pytest.raises(UserError, match="has more than 50,000 values"):
            read_runs([runs / "a"])
        shown = table(known_runs([])).splitlines()
        assert len(shown) == 3
        assert "finished" in shown[2]


def test_a_config_that_holds_itself_is_refused_and_plain_aliases_are_taken(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("run: &run {name: x, more: *run}\n")
    with pytest.raises(UserError, match="holds itself by an alias"):
        configuration.load(path)
    path.write_text("a: &a {lr: 1}\nb: &b {<<: *a, warmup_steps: 3}\noptim: *b\n")
    assert configuration.read_tree(path)["optim"] == {"lr": 1, "warmup_steps": 3}


# A run goes on


def test_a_run_goes_on_over_lines_that_are_none_and_through_links_of_its_owner(digits, tmp_path):
    """runs/, the run and its checkpoints lie elsewhere, as on a cluster with a scratch disk."""
    for name in ("scratch/runs", "scratch/run", "scratch/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "scratch/runs")
    (tmp_path / "runs/tiny").symlink_to(tmp_path / "scratch/run")
    (tmp_path / "scratch/run/checkpoints").symlink_to(tmp_path / "scratch/checkpoints")
    run_ranks(train, 1, tiny(digits, tmp_path / "runs", "train.steps=2", "train.checkpoint_every=2"))
    journal = tmp_path / "scratch/run/journal.jsonl"
    whole = journal.read_bytes().splitlines()[-1]
    with journal.open("ab") as f:
        f.write(b'{"event": "train", "context": ' + b"[" * 100_000 + b"\n")
        f.write(whole[:-1] + b', "deep": ' + b"[" * 500 + b"]" * 500 + b"}\n")
        f.write(whole.replace(b'"attempt": 1', b'"attempt": %d' % 10**300) + b"\n")
        f.write(whole.replace(b'"step": 2', b'"step": NaN') + b"\n")
    config = tiny(digits, tmp_path / "runs", "train.steps=4", "train.checkpoint_every=2")
    run_ranks(train, 1, config)
    assert len(losses(config)) == 4
    assert [line["step"] for line in events(journal) if line["event"] == "attempt"] == [0, 2]
    assert [path.name for path in complete(tmp_path / "scratch/checkpoints")] == ["step-00000002", "step-00000004"]
    assert "finished, 4 unusable lines" in table([RunDirectory(config.run.path)])
    page = _page(config.run.path)
    assert "unusable lines, left out" in page
    assert "<title>tiny · " in page  # as its owner calls it, and not as the folder that the link leads to


def test_a_log_that_is_a_fifo_costs_output_and_not_the_run(digits, tmp_path):
    config = tiny(digits, tmp_path, "train.steps=2")
    (config.run.path / "logs").mkdir(parents=True)
    os.mkfifo(config.run.path / "logs" / "rank-1.log")
    run_ranks(train, 2, config)
    assert len(losses(config)) == 2


def _page(run: Path) -> str:
    from dtrain.report.page import page

    return page(read_runs([run]))


# What lies among checkpoints, evaluations and uploads


def test_links_among_checkpoints_are_not_followed_and_are_said(tmp_path):
    tensors = {"a:fp32": np.ones(8, np.float32)}
    elsewhere = save(tmp_path / "elsewhere", tensors, [{"a:fp32": (0, 8)}])
    folder = tmp_path / "checkpoints"
    path = save(folder, tensors, [{"a:fp32": (0, 8)}])
    (folder / "step-00000002").symlink_to(elsewhere)
    with pytest.raises(Damaged, match="step-00000002 is a link"):
        Checkpoint.open(complete(folder)[-1])
    for name in ("rank-00000.json", "rank-00000.safetensors", "manifest.json"):
        (path / name).unlink()
        (path / name).symlink_to(elsewhere / name)
        with pytest.raises(Damaged, match=name):
            Checkpoint.open(path).verify()
    remove(folder / "step-00000002")
    (folder / "step-00000003.partial").symlink_to(elsewhere)
    remove_partial(folder)
    assert Checkpoint.open(elsewhere).tensor("a:fp32").sum() == 8  # what a link led to is untouched
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]


def test_links_among_evaluations_are_not_followed(tmp_path):
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    scratch = Scratch(tmp_path / "evaluations", {"seed": 1})
    scratch.write(0, images)
    shutil.move(scratch.path, tmp_path / "elsewhere")
    scratch.path.parent.mkdir(exist_ok=True)
    scratch.path.symlink_to(tmp_path / "elsewhere")
    assert scratch.read(0, 2, (1, 2, 2)) is None
    scratch.write(2, images)
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["block-000000000000-2.npy"]


def test_a_reports_pictures_may_lie_on_another_disk_and_nowhere_else(runs):
    run = runs / "a"
    before = grids(read_runs([run])).count("<img")
    shutil.move(run / "samples", runs.parent / "scratch")
    (run / "samples").symlink_to(runs.parent / "scratch")
    assert grids(read_runs([run])).count("<img") == before
    grid = run / "samples/step-00000012.png"
    shutil.move(grid, runs.parent / "elsewhere.png")
    grid.symlink_to(runs.parent / "elsewhere.png")
    for name in ("../../elsewhere.png", str(runs.parent / "elsewhere.png"), "samples/../../../elsewhere.png"):
        append(run, "eval", 12, {"fd_pixels": 1.0}, {"artifact": name})
    assert grids(read_runs([run])).count("<img") == before - 1


def test_what_leads_out_of_a_run_is_not_sent_to_mlflow(tmp_path, caplog):
    from mlflow import MlflowClient

    from dtrain.tracking.mlflow import sync
    from tests.tracking.mlflow.destinations import destination

    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (tmp_path / "scratch").mkdir()
    (run / "samples").symlink_to(tmp_path / "scratch")
    (tmp_path / "secret.txt").write_text("a key")
    (tmp_path / "scratch/a.txt").write_text("own")
    (tmp_path / "scratch/link.txt").symlink_to(tmp_path / "secret.txt")
    (run / "report.html").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(tmp_path / "scratch/fifo.txt")
    journal = Journal(run / "journal.jsonl")
    names = ["samples/a.txt", "samples/link.txt", "samples/fifo.txt", "../../secret.txt", str(tmp_path / "secret.txt")]
    for step, name in enumerate(names, start=1):
        journal.append("samples", step, 8, context={"artifact": name})
    with within_seconds(60):
        sync(destination(run))
    client = MlflowClient(destination(run).uri)
    (found,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    stored = Path(found.info.artifact_uri.removeprefix("file://"))
    assert {p.relative_to(stored).as_posix() for p in stored.rglob("*") if p.is_file()} == {"samples/a.txt"}
    assert "link.txt is named in the journal" in caplog.text


# Members


def test_verify_tests_members_and_not_only_the_shard(tmp_path):
    manifest = data_set(tmp_path, labelled_pictures(4))
    whole = np.fromfile(tmp_path / "manifest.members", MEMBER).reshape(-1, 2)
    assert verify(manifest, tmp_path) == {}
    wrong = {
        "overlap": (whole[0, 1]["offset"], whole[1, 1]["size"], whole[1, 1]["crc32"]),
        "behind the end": (1 << 63, 10, 0),
        "header": (whole[1, 1]["offset"] - 512, 10, 0),
        "crc32": (whole[1, 1]["offset"], whole[1, 1]["size"], 7),
        "shorter": (whole[1, 1]["offset"], 1, whole[1, 1]["crc32"]),
    }
    for name, member in wrong.items():
        table = whole.copy()
        table[1, 1] = member
        rewrite_side(tmp_path, table)
        found = verify(load(tmp_path / "manifest.json"), tmp_path)
        assert list(found) == [str(tmp_path / manifest.shards[0].name)], name
        (problem,) = found.values()
        assert problem.startswith("is whole, but the side file is wrong about png of sample 1"), problem
        assert problem.endswith("run `dtrain index` again")


def test_a_member_behind_its_shard_is_a_bad_sample_by_name(tmp_path):
    data_set(tmp_path, labelled_pictures(4))
    table = np.fromfile(tmp_path / "manifest.members", MEMBER).reshape(-1, 2)
    table[2, 1]["offset"] = 1 << 63
    rewrite_side(tmp_path, table)
    reader = ShardReader(load(tmp_path / "manifest.json"), tmp_path)
    with pytest.raises(BadSample, match="places png of sample 2 behind the shard's end; run `dtrain index` again"):
        reader.read(2)
    assert reader.read(1)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a/../../x.tar", "a\0.tar", ""])
def test_names_in_a_manifest_lead_nowhere_else(tmp_path, name):
    import json

    data_set(tmp_path, labelled_pictures(4))
    path = tmp_path / "manifest.json"
    document = json.loads(path.read_text())
    document["shards"][0]["name"] = name
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"manifest.json is not a manifest \(shards.0.name"):
        load(path)
