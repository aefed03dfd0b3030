"""Whatever lies where a run's or a data set's files should be: each reader answers, or raises a UserError, and soon.

Files are made by the product's own writers and changed at random: values of JSON by hostile ones, hashes made to fit
again, and bytes. DTRAIN_CAMPAIGN_FUZZ says how many of each kind; a failure says the seed.
"""

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain import config as configuration
from dtrain.checkpoint import format
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.cluster.status import known_runs, table
from dtrain.data.fields.survey import survey
from dtrain.data.shards.manifest import glance, load
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.tar import MEMBER
from dtrain.data.shards.verify import verify
from dtrain.errors import BadSample, UserError
from dtrain.lock import holder
from dtrain.report.page import page
from dtrain.report.runs import read_runs
from dtrain.run import RunDirectory
from dtrain.tracking.journal import Journal, evaluations, events, highest_attempt, read
from dtrain.tracking.metadata import datasets, params, tags
from dtrain.tracking.mlflow.description import Landmarks, description
from dtrain.tracking.mlflow.files import files_of
from dtrain.tracking.mlflow.keys import image_key, metric_key
from dtrain.training.identity import has_trained
from dtrain.training.record.summary import summary
from tests.checkpoint.written import save
from tests.data.shard_files import data_set, labelled_pictures, rewrite_side
from tests.report.made import CONTEXT, append, make_run

INPUTS = int(os.environ.get("DTRAIN_CAMPAIGN_FUZZ", "12"))  # of each kind
LONGEST = 10.0  # seconds of processor time for all readers of one input

DEEP: Any = []
for _ in range(90):
    DEEP = [DEEP]
HOSTILE = [None, True, False, 0, -1, 1, 2**53, 2**63, 2**64, 10**400, -(10**400), 0.5, 1e300, -1e308, 5e-324, 1e-7]
HOSTILE += [float("nan"), float("inf"), "", "x", "NaN", "-Infinity", "\ud800", "\x1b[2J\n", "a\0b", "../../x", "/etc"]
HOSTILE += ["١", "²", "9" * 5000, "loss_level_" + "9" * 400, "a://" * 2000, [], {}, [[1]], ["x", 1], {"x": {}}, DEEP]


def change(tree: Any, rng: random.Random) -> Any:
    """The plain data with one to three of its values, or keys, made hostile."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = [(None, None)]
        stack = [tree]
        while stack:
            node = stack.pop()
            for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                places.append((node, key))
                if len(places) < 10_000 and node[key] is not DEEP:
                    stack.append(node[key])
        node, key = rng.choice(places)
        value = rng.choice(HOSTILE)
        if node is None:
            tree = value if rng.random() < 0.2 else tree
        elif isinstance(node, dict) and rng.random() < 0.3:
            node[rng.choice([h for h in HOSTILE if isinstance(h, str)])] = node.pop(key)
        elif rng.random() < 0.2:
            del node[key]
        else:
            node[key] = value
    return tree


def spoiled(data: bytes, rng: random.Random) -> bytes:
    """The bytes with some cut off, changed, put in or repeated."""
    kind, at = rng.randrange(5), rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.choice([b"[" * 100_000, b"\0" * 3000, b"\xff\xfe", b"\n", b'{"a":' * 5000]) + data[at:]
    if kind == 3:
        return data + data[at:]
    return bytes(rng.randrange(256) for _ in range(300))


def answers(seed: int, readers: list[Callable[[], Any]], refusals: tuple = (UserError,)) -> None:
    """Each reader returns, or raises a refusal that is one line, and all of them within LONGEST."""
    begin, said = time.process_time(), []
    for reader in readers:
        try:
            reader()
        except refusals as e:
            said.append(str(e))
        except Exception as e:
            e.add_note(f"seed {seed}")
            raise
    assert [line for line in said if "\n" in line] == [], f"seed {seed}"
    assert time.process_time() - begin < LONGEST, f"seed {seed}"


def inputs(kind: str):
    for number in range(INPUTS):
        yield f"{kind} {number}", random.Random(f"{kind} {number}")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """runs/made with an evaluation of a job, a sweep and a change of its config."""
    folder = tmp_path_factory.mktemp("foreign")
    with pytest.MonkeyPatch.context() as patch:
        path = make_run(
            folder / "runs", patch, datasets=[{"name": "a", "hash": "0" * 64, "samples": 3}], skipped=[[0, 8]]
        )
        append(path, "config", 12, context={"changed": {"optim.lr": [1, 2]}})
    (path / "journal-eval-x.jsonl").write_bytes((path / "journal.jsonl").read_bytes())
    (path / "journal-rank-1.jsonl").write_bytes((path / "journal.jsonl").read_bytes())
    with open(path / "sweep.jsonl", "w") as f:
        for steps in (5, 10, 20):
            line = {"event": "sweep", "key": f"{steps}", "setting": {"steps": steps}, "step": 12, "images": 288}
            line |= {"attempt": 0, "time": 1.8e9, "context": CONTEXT | {"ema": "ema_0", "n": 500, "steps": steps}}
            f.write(json.dumps(line | {"metrics": {"fd_pixels": steps / 10}}) + "\n")
    (path / "mlflow.json").write_text(json.dumps({"uri": "sqlite:///x.db", "experiment": "1", "run": "a"}))
    return path


@pytest.fixture
def run(made, tmp_path, monkeypatch) -> RunDirectory:
    """A copy of that run, beside one that nobody touches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("made", "other"):
        shutil.copytree(made, tmp_path / "runs" / name)
    return RunDirectory(Path("runs/made"))


def status_lines() -> dict[str, str]:
    lines = table(known_runs([])).splitlines()
    return {line.split()[0]: line for line in lines[1:]}


def mlflow_words(run: RunDirectory) -> None:
    """All that a journal's lines become in MLflow, but for the server."""
    config, lines = run.config(), read(run.journal_file)
    params(lines, config), tags(lines), datasets(lines, config.data)
    landmarks = Landmarks()
    landmarks.add(lines, [line for line in lines if line["event"] == "attempt"])
    description(landmarks, {})
    for line in lines:
        files_of(line), image_key(line)
        for metric in line["metrics"]:
            metric_key(line, metric)


def readers_of(run: RunDirectory) -> list[Callable[[], Any]]:
    def status() -> None:
        shown = status_lines()
        assert set(shown) == {"runs/made", "runs/other"}, shown
        assert "finished" in shown["runs/other"]

    return [
        status,
        lambda: page(read_runs([run.path])),
        lambda: highest_attempt(events(run.journal_file)),
        lambda: has_trained(run),
        lambda: run.outcome(),
        lambda: holder(run.lock_file),
        lambda: evaluations(run.journal_file),
        lambda: mlflow_words(run),
        lambda: summary(run.path),
    ]


def test_whatever_stands_in_journals_status_report_and_the_next_start_go_on(run):
    paths = [
        run.path / name for name in ("journal.jsonl", "journal-eval-x.jsonl", "journal-rank-1.jsonl", "sweep.jsonl")
    ]
    whole = {path: path.read_bytes().splitlines(keepends=True) for path in paths}
    for seed, rng in inputs("journals"):
        for path, lines in whole.items():
            lines = list(lines)
            for number in rng.sample(range(len(lines)), min(len(lines), rng.choice([0, 2, 8]))):
                changed = json.dumps(change(json.loads(lines[number]), rng)).encode() + b"\n"
                lines[number] = changed if rng.random() < 0.8 else spoiled(lines[number], rng)
            path.write_bytes(b"".join(lines))
        answers(seed, readers_of(run))
        journal = Journal(run.journal_file)
        number = journal.begin_attempt(4, 96)
        journal.close()
        assert events(run.journal_file)[-1]["attempt"] == number, f"seed {seed}"


def test_whatever_stands_in_small_files_status_and_report_go_on(run):
    whole = {
        "outcome.json": {"outcome": "finished", "step": 12, "attempt": 2, "message": "x"},
        "lock": {"host": "a", "boot": "b", "namespace": "c", "pid": 7, "started": "8", "job": "9", "restarts": None},
        "mlflow.json": {"uri": "sqlite:///x.db", "experiment": "1", "run": "a"},
    }
    for seed, rng in inputs("small files"):
        for name, body in whole.items():
            text = json.dumps(change(body, rng)).encode()
            (run.path / name).write_bytes(text if rng.random() < 0.8 else spoiled(text, rng))
        answers(seed, readers_of(run))


def test_whatever_stands_in_a_config_status_and_report_go_on(run):
    import yaml

    whole = yaml.safe_load(run.config_file.read_text())
    for seed, rng in inputs("config.yaml"):
        changed = change(whole, rng)
        text = json.dumps(changed).encode()
        run.config_file.write_bytes(text if rng.random() < 0.8 else spoiled(yaml.safe_dump(whole).encode(), rng))
        answers(seed, [*readers_of(run), lambda: configuration.load(run.config_file, ["train.steps=5"])])


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    data_set(folder, labelled_pictures(12), 4)
    return folder


def data_readers(folder: Path) -> list[Callable[[], Any]]:
    def samples() -> None:
        manifest = load(folder / "manifest.json")
        reader = ShardReader(manifest, folder)
        for sample in range(min(manifest.samples, 50)):
            with contextlib.suppress(BadSample):
                reader.read(sample)

    def surveyed() -> None:
        survey(load(folder / "manifest.json"), folder)

    return [
        lambda: glance(folder / "manifest.json") and glance(folder / "manifest.json").hash,
        samples,
        surveyed,
        lambda: verify(load(folder / "manifest.json"), folder),
    ]


def test_whatever_stands_in_a_manifest_it_is_read_or_refused(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "data")
    path = folder / "manifest.json"
    whole = json.loads(path.read_bytes())
    for seed, rng in inputs("manifest.json"):
        text = json.dumps(change(whole, rng)).encode()
        path.write_bytes(text if rng.random() < 0.8 else spoiled(text, rng))
        answers(seed, data_readers(folder))


def test_whatever_stands_in_a_side_file_no_sample_is_read_wrong_and_verify_finds_it(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "data")
    whole = np.fromfile(folder / "manifest.members", MEMBER)
    hostile = [0, 1, 511, 512, 513, 1 << 31, (1 << 32) - 2, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 512]
    for seed, rng in inputs("manifest.members"):
        table = whole.copy()
        for _ in range(rng.randint(1, 3)):
            row, name = rng.randrange(len(table)), rng.choice(["offset", "size", "crc32"])
            value = rng.choice([*hostile, int(table[rng.randrange(len(table))][name])])
            table[row][name] = value % (1 << (64 if name == "offset" else 32))
        rewrite_side(folder, table)
        answers(seed, data_readers(folder))
        manifest = load(folder / "manifest.json")
        found = verify(manifest, folder)
        assert bool(found) == (table.tobytes() != whole.tobytes()) or (table["size"] == 0xFFFFFFFF).any(), (
            f"seed {seed}"
        )


def test_whatever_stands_in_a_checkpoint_it_is_read_or_damaged(tmp_path):
    """The hashes are made to fit again, as somebody would who means harm."""
    tensors = {f"{name}:{key}": np.ones(300, np.float32) for name in ("a", "b") for key in ("fp32", "ema_0")}
    cuts = [dict.fromkeys(tensors, (0, 100)), dict.fromkeys(tensors, (100, 300))]
    meta = {"step": 1, "images": 8, "optimizer_steps": 1, "bad_steps": {"norms": [1.0]}}
    whole = save(tmp_path / "whole", tensors, cuts, meta=meta)
    for seed, rng in inputs("checkpoint"):
        path = tmp_path / "step-00000001"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        index = path / f"rank-0000{rng.randrange(2)}.json"
        text = json.dumps(change(json.loads(index.read_bytes()), rng)).encode()
        if rng.random() < 0.5:
            index.write_bytes(text if rng.random() < 0.8 else spoiled(text, rng))
        body = json.loads((path / "manifest.json").read_bytes())
        del body["sha256"]
        body["indexes"] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.glob("rank-*.json")}
        if rng.random() < 0.5:
            body = change(body, rng)
        if isinstance(body, dict):
            body = {"sha256": format._hash(body), **body}
        (path / "manifest.json").write_text(json.dumps(body))

        def read_all(path: Path = path) -> None:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify()
            for name in checkpoint.tensors:
                checkpoint.tensor(name)

        answers(seed, [read_all], (Damaged,))
