"""What a user deletes in MLflow while a run trains, and names that are no paths there."""

import json
import logging
import time
from pathlib import Path

import pytest
from PIL import Image

from dtrain.errors import UserError
from dtrain.tracking.journal import Journal
from dtrain.tracking.mlflow import Destination, Shipper, default_uri, shipper, sync
from tests.tracking.servers import Rest


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all runs of these tests, which share one SQLite store."""
    return tmp_path_factory.mktemp("deleted") / "runs"


@pytest.fixture
def run(runs, request, monkeypatch) -> Path:
    monkeypatch.setattr(shipper, "POLL_SECONDS", 0.05)
    path = runs / request.node.originalname
    (path / "samples").mkdir(parents=True)
    return path


def destination(run: Path, **changed) -> Destination:
    whole = {"journal_path": run / "journal.jsonl", "uri": default_uri(run), "experiment": run.name}
    return Destination(**whole | {"run_name": run.name, "run_key": f"key-of-{run.name}"} | changed)


def steps(journal: Journal, numbers) -> None:
    for step in numbers:
        journal.append("train", step, 8 * step, {"loss": 1 / step, "lr": 1e-3})


def client_and_runs(run: Path):
    from mlflow import MlflowClient

    client = MlflowClient(default_uri(run))
    experiment = client.get_experiment_by_name(run.name).experiment_id
    return client, client.search_runs([experiment], f"tags.`dtrain.run_key` = 'key-of-{run.name}'")


def curve(run: Path, key: str) -> list[int]:
    """The steps of a curve in the one run that there is; a step that was sent twice comes twice."""
    client, (found,) = client_and_runs(run)
    return sorted(m.step for m in client.get_metric_history(found.info.run_id, key))


def of_sweep(run: Path) -> list:
    client, (found,) = client_and_runs(run)
    return client.search_runs([found.info.experiment_id], f"tags.`dtrain.sweep_of` = 'key-of-{run.name}'")


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_deleted_while_it_trains_is_sent_again_whole_to_a_new_one(run, caplog):
    journal = Journal(run / "journal.jsonl")
    steps(journal, range(1, 6))
    Image.new("L", (8, 8), 200).save(run / "samples/5.png")
    journal.append("eval", 5, 40, {"fd_pixels": 3.0}, {"ema": "ema_0", "n": 8, "artifact": "samples/5.png"})
    line = {"event": "sweep", "key": "0" * 64, "setting": {"eta": 1}, "step": 5, "images": 40, "attempt": 0}
    line |= {"time": 1.0, "metrics": {"fd_pixels": 1.0}, "context": {"ema": "raw", "n": 2}}
    (run / "sweep.jsonl").write_text(json.dumps(line) + "\n")
    training = Shipper(destination(run))
    training.start()
    until(lambda: training.run_id and len(of_sweep(run)) == 2)
    client, (first,) = client_and_runs(run)
    client.delete_run(first.info.run_id)
    with caplog.at_level(logging.WARNING):
        steps(journal, range(6, 11))
        assert training.close(timeout=60) == 0, training.error
    assert caplog.text.count("the run was deleted in MLflow: all of it is sent again, to a new one") == 1
    client, (second,) = client_and_runs(run)
    assert second.info.run_id not in (None, first.info.run_id)
    assert second.info.status == "FINISHED"
    assert json.loads((run / "mlflow.json").read_text())["run"] == second.info.run_id  # where the link leads
    assert curve(run, "train/loss") == curve(run, "train/lr") == list(range(1, 11))
    assert curve(run, "eval/ema_0/n8/fd_pixels") == [5]
    assert [f for f in client.list_artifacts(second.info.run_id, "images") if f.path.endswith(".png")]
    assert "the best so far" in second.data.tags["mlflow.note.content"]  # one evaluation, not two of the same
    parents = {r.info.run_id: r.data.tags["mlflow.parentRunId"] for r in of_sweep(run)}
    assert len(parents) == 2
    assert second.info.run_id in parents.values()
    assert first.info.run_id not in parents.values()
    assert sync(destination(run)) == 0


def test_a_hole_in_a_curve_is_filled_by_the_next_who_sends_it(run):
    """As an earlier version left it, which sent but what came after a run was made anew."""
    journal, rest = Journal(run / "journal.jsonl"), Journal(run / "rest.jsonl")
    steps(rest, [1, 5, 6, 7])
    assert sync(destination(run, journal_path=rest.path)) == 4
    steps(journal, range(1, 9))
    journal.append("train", 9, 72, {"lr": 1e-3})
    assert sync(destination(run)) == 5
    assert curve(run, "train/loss") == list(range(1, 9))
    assert curve(run, "train/lr") == list(range(1, 10))
    assert sync(destination(run)) == 0


def test_a_deleted_experiment_is_said_with_what_to_do_and_its_run_goes_on_once_it_is_back(run, server, caplog):
    server.start()
    to, rest = destination(run, uri=server.url), Rest(server.url)
    journal = Journal(run / "journal.jsonl")
    steps(journal, range(1, 4))
    training = Shipper(to)
    training.start()
    until(lambda: training.run_id and rest.run(run.name, run.name)["data"].get("metrics"))
    experiment = rest.experiment(run.name)
    rest.post("experiments/delete", experiment_id=experiment)
    with caplog.at_level(logging.WARNING):
        steps(journal, range(4, 6))
        assert training.close(timeout=3) == 2
    words = f"the experiment '{run.name}' is deleted in MLflow; restore the experiment or name another"
    assert caplog.text.count(words) == 1
    assert words in json.loads((run / "mlflow.json").read_text())["problem"]
    with pytest.raises(UserError) as met:
        sync(to)
    assert str(met.value).endswith(f"mlflow experiments restore --experiment-id {experiment}, or tracking.experiment")
    rest.post("experiments/restore", experiment_id=experiment)
    assert sync(to) == 2
    found = rest.run(run.name, run.name)
    assert found["info"]["run_id"] == training.run_id
    assert [step for step, _, _ in rest.history(found)["train/loss"]] == [1, 2, 3, 4, 5]


def test_an_experiment_is_a_name_and_never_a_path(tmp_path):
    run = tmp_path / "deep" / "enough" / "runs" / "one"
    run.mkdir(parents=True)
    Journal(run / "journal.jsonl").append("train", 1, 8, {"loss": 1.0}, {"artifact": "top.txt"})
    (run / "top.txt").write_text("a")
    names = [f"{tmp_path}/Users/me/x", "../../x", "..", "a/b", "a_b", "x" * 300]
    for name in names:
        assert sync(destination(run, experiment=name)) == 1
    assert {p.name for p in run.parent.iterdir()} == {"one", "mlflow.db", "mlflow.db.lock", "mlartifacts"}
    folders = list((run.parent / "mlartifacts").iterdir())
    assert len(folders) == len(names)
    assert {f.name for f in folders} & set(names) == {"a_b"}  # that one is a folder's name
    for folder in folders:
        assert [p.relative_to(folder).parts[1:] for p in folder.rglob("top.txt")] == [("artifacts", "top.txt")]
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["enough"]


def test_a_file_that_a_journal_names_outside_its_run_is_not_sent(run, caplog):
    (run.parent / "secret.txt").write_text("s3cret")
    (run / "link.txt").symlink_to(run.parent / "secret.txt")
    journal = Journal(run / "journal.jsonl")
    for step, file in enumerate(["../secret.txt", str(run.parent / "secret.txt"), "link.txt", "samples/own.txt"], 1):
        journal.append("train", step, 8, {"loss": 1.0}, {"artifacts": [file]})
    (run / "samples" / "own.txt").write_text("own")
    with caplog.at_level(logging.WARNING):
        sync(destination(run))
    assert caplog.text.count("no file of the run: not sent") == 3
    _, (found,) = client_and_runs(run)
    stored = Path(found.info.artifact_uri.removeprefix("file://"))
    assert [p.relative_to(stored).as_posix() for p in stored.rglob("*.txt")] == ["samples/own.txt"]
