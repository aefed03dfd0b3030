import io
import json
import math
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from dtrain.errors import UserError
from dtrain.tracking import journal as journal_module
from dtrain.tracking.journal import Journal, read
from dtrain.tracking.mlflow import Shipper, default_uri, sync
from dtrain.tracking.mlflow import shipper as shipper_module
from tests.tracking.mlflow.destinations import EXPERIMENT, destination


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all runs of these tests, which share one SQLite store."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(runs, request) -> Path:
    path = runs / request.node.name
    path.mkdir()
    return path


def ship(run: Path, **changed) -> None:
    shipper = Shipper(destination(run, **changed))
    shipper.start()
    assert shipper.close(timeout=60) == 0, shipper.error


def mlflow_run(run: Path, uri: str | None = None):
    from mlflow import MlflowClient

    client = MlflowClient(uri or default_uri(run))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`dtrain.run_key` = 'key-of-{run.name}'")
    return client, found


def arrived(run: Path, uri: str | None = None) -> dict[str, list[tuple[int, int, float]]]:
    """Metric key → its whole history as (step, milliseconds, value), in order of steps; nothing collapsed."""
    client, found = mlflow_run(run, uri)
    return {
        key: sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(found.info.run_id, key))
        for key in found.data.metrics
    }


def journalled(run: Path) -> dict[str, list[tuple[int, int, float]]]:
    """The same from the journal, for runs where no step comes twice."""
    history: dict[str, list] = {}
    for line in read(run / "journal.jsonl"):
        prefix = line["event"]
        if prefix == "checkpoint":
            continue  # how long it took is no curve
        if prefix == "eval":
            prefix = f"eval/{line['context']['ema']}/n{line['context']['n']}"
        for name, value in line["metrics"].items():
            if name == "images_per_second":
                name = f"speed/{name}"
            history.setdefault(f"{prefix}/{name}", []).append((line["step"], round(1000 * line["time"]), value))
    return history


def write_steps(journal: Journal, steps, offset: float = 0.0) -> None:
    for step in steps:
        journal.append("train", step, 8 * step, {"loss": 1 / step + offset, "images_per_second": 10.0 + step})


def test_what_arrives_is_the_journal(run):
    journal = Journal(run / "journal.jsonl")
    journal.begin_attempt(0, 0, {"host": "a"})
    write_steps(journal, range(1, 6))
    shipper = Shipper(destination(run))
    shipper.start()
    write_steps(journal, range(6, 11))
    for n in (500, 2000):
        journal.append("eval", 10, 80, {"fd_pixels": 3.25 + n}, {"ema": "0.999", "n": n})
    journal.append("eval", 10, 80, {"fd_pixels": 9.0}, {"ema": "raw", "n": 500})
    journal.append("checkpoint", 10, 80, {"seconds": 0.5}, {"path": "checkpoints/step-10"})
    assert shipper.close(timeout=60) == 0, shipper.error
    assert arrived(run) == journalled(run)
    assert set(arrived(run)) == {
        "train/loss",
        "train/speed/images_per_second",
        "eval/0.999/n500/fd_pixels",
        "eval/0.999/n2000/fd_pixels",
        "eval/raw/n500/fd_pixels",
    }
    _, found = mlflow_run(run)
    assert found.info.run_id == shipper.run_id
    assert found.info.run_name == run.name
    assert found.info.status == "FINISHED"
    assert found.info.start_time == round(1000 * read(run / "journal.jsonl")[0]["time"])
    assert found.info.end_time == round(1000 * read(run / "journal.jsonl")[-1]["time"])
    assert found.data.params == {"model.width": "96", "optim.lr": "0.001"}
    assert found.data.tags["git.commit"] == "abc"


def test_of_many_lines_few_wait_in_memory_and_all_that_count_arrive(run, monkeypatch):
    """Also those of an attempt whose end a later part of the journal makes void."""
    monkeypatch.setattr(shipper_module, "MOST_LINES", 4)
    monkeypatch.setattr(journal_module, "_CHUNK", 1000)
    journal = Journal(run / "journal.jsonl")
    for begin, end in ((0, 30), (20, 45), (45, 60)):
        journal.begin_attempt(begin, 8 * begin)
        write_steps(journal, range(begin + 1, end + 1))
    held, poll = [], shipper_module.Pending.poll

    def watched(pending) -> bool:
        found = poll(pending)
        held.append(len(pending.lines))
        return found

    monkeypatch.setattr(shipper_module.Pending, "poll", watched)
    assert sync(destination(run)) == 60
    assert 0 < max(held) < 20  # a part of the file at a time
    assert arrived(run) == journalled(run)
    assert shipper_module.Pending(destination(run)).count() == 60


def test_a_restarted_run_goes_on_in_its_mlflow_run_and_sends_nothing_twice(run):
    journal = Journal(run / "journal.jsonl")
    journal.begin_attempt(0, 0)
    write_steps(journal, range(1, 6))
    ship(run)
    first = mlflow_run(run)[1]
    ship(run)
    assert sync(destination(run)) == 0
    assert arrived(run) == journalled(run)
    journal.begin_attempt(5, 40)
    write_steps(journal, range(6, 9))
    shipper = Shipper(destination(run, params={"optim.lr": 5e-4, "new.key": None}, tags={"git.commit": "def"}))
    shipper.start()
    end = time.monotonic() + 30
    while arrived(run) != journalled(run):
        assert time.monotonic() < end, shipper.error
        time.sleep(0.1)
    assert mlflow_run(run)[1].info.status == "RUNNING"
    assert shipper.close(timeout=60, status="KILLED") == 0
    again = mlflow_run(run)[1]
    assert again.info.run_id == first.info.run_id
    assert again.info.status == "KILLED"
    assert again.data.params == {"model.width": "96", "optim.lr": "0.001", "new.key": "None"}
    assert again.data.tags["git.commit"] == "def"
    assert arrived(run) == journalled(run)


def test_void_lines_are_not_sent_and_steps_gone_through_again_are_not_doubled(run):
    journal = Journal(run / "journal.jsonl")
    journal.begin_attempt(0, 0)
    write_steps(journal, range(1, 9), offset=100)
    ship(run)  # what is there cannot be taken back
    write_steps(journal, range(9, 13), offset=200)  # written, never shipped, then void
    journal.begin_attempt(4, 32)
    write_steps(journal, range(5, 15), offset=300)
    ship(run)
    losses = [(step, value - 1 / step) for step, _, value in arrived(run)["train/loss"]]
    assert [step for step, _ in losses] == list(range(1, 15))
    assert [round(offset) for _, offset in losses] == [100] * 8 + [300] * 6


def test_a_torn_line_does_not_stop_what_comes_after_it(run):
    path = run / "journal.jsonl"
    write_steps(Journal(path), [1, 2])
    path.write_bytes(path.read_bytes()[:-30])
    ship(run)
    write_steps(Journal(path), [3])
    ship(run)
    assert [step for step, _, _ in arrived(run)["train/loss"]] == [1, 3]
    assert arrived(run) == journalled(run)


def test_more_lines_than_one_request_takes_all_arrive(run):
    journal = Journal(run / "journal.jsonl")
    write_steps(journal, range(1, 1300))
    assert sync(destination(run), status="FAILED") == 1299
    assert arrived(run) == journalled(run)
    assert mlflow_run(run)[1].info.status == "FAILED"


def test_non_finite_values_and_odd_names_do_not_hold_up_the_rest(run):
    journal = Journal(run / "journal.jsonl")
    journal.append("train", 1, 8, {"loss": math.nan, "norm(§)": math.inf})
    journal.append("train", 2, 16, {"loss": 0.5})
    ship(run, params={"deepspeed.extra.a=b": "x" * 10_000})
    history = arrived(run)
    assert math.isnan(history["train/loss"][0][2])
    assert history["train/loss"][1][2] == 0.5
    assert history["train/norm___"][0][2] > 1e308  # as MLflow keeps infinity
    assert set(mlflow_run(run)[1].data.params) == {"deepspeed.extra.a_b"}


def test_a_picture_that_a_crash_cut_off_holds_up_nothing(run, caplog):
    journal = Journal(run / "journal.jsonl")
    (run / "samples").mkdir()
    picture = io.BytesIO()
    Image.new("L", (40, 40)).save(picture, "png")
    for step, size in enumerate([0, 10, len(picture.getvalue()) - 30]):
        (run / f"samples/step-{step}.png").write_bytes(picture.getvalue()[:size])
        context = {"ema": "raw", "n": 2, "artifact": f"samples/step-{step}.png"}
        journal.append("eval", step, 8, {"fd_pixels": 1.0}, context)
    journal.append("train", 4, 8, {"loss": 1.0})
    assert sync(destination(run)) == 4
    assert caplog.text.count("cannot be read") == 3


def test_tasks_of_a_sweep_that_end_together_make_one_parent_and_no_child_twice(run):
    Journal(run / "journal.jsonl").append("train", 4, 8, {"loss": 1.0})
    context = {"ema": "raw", "n": 2}
    with open(run / "sweep.jsonl", "w") as f:
        for number in range(4):
            line = {"event": "sweep", "key": f"{number}" * 64, "setting": {"eta": number}, "step": 4, "images": 8}
            line |= {"attempt": 0, "time": 1.0, "metrics": {"fd_pixels": 1.0}, "context": context}
            f.write(json.dumps(line) + "\n")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(sync, [destination(run)] * 3))
    client, found = mlflow_run(run)
    below = client.search_runs([found.info.experiment_id], f"tags.`dtrain.sweep_of` = 'key-of-{run.name}'")
    assert len(below) == 1 + 4


def test_files_named_by_events_arrive_once_under_their_own_path(run, caplog):
    journal = Journal(run / "journal.jsonl")
    (run / "samples").mkdir()
    for step in (1, 2):
        (run / f"samples/step-{step}.png").write_bytes(os.urandom(5000))
        journal.append("samples", step, 8, context={"artifact": f"samples/step-{step}.png"})
    journal.append("samples", 3, 8, context={"artifact": "samples/deleted.png"})
    journal.append("samples", 4, 8, context={"artifact": "top.txt"})
    (run / "top.txt").write_text("a")
    assert sync(destination(run)) == 3
    assert "deleted.png is named in the journal but gone" in caplog.text
    _, found = mlflow_run(run)
    stored = Path(found.info.artifact_uri.removeprefix("file://"))
    assert run.parent in stored.parents
    assert {p.relative_to(stored).as_posix() for p in stored.rglob("*.*")} == {
        "samples/step-1.png",
        "samples/step-2.png",
        "top.txt",
    }
    for step in (1, 2):
        assert (stored / f"samples/step-{step}.png").read_bytes() == (run / f"samples/step-{step}.png").read_bytes()
    touched = (stored / "samples/step-1.png").stat().st_mtime_ns
    (stored / "samples/step-2.png").write_bytes(b"an upload that was cut off")
    ship(run)
    assert (stored / "samples/step-1.png").stat().st_mtime_ns == touched
    assert (stored / "samples/step-2.png").read_bytes() == (run / "samples/step-2.png").read_bytes()
    assert sync(destination(run)) == 0


@pytest.fixture(params=["closed port", "silent server"])
def dead_server(request):
    """An address where nobody listens, and one that takes connections and never answers, with credentials in it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        if request.param == "silent server":
            s.listen(50)
        yield f"http://user:s3cret@127.0.0.1:{s.getsockname()[1]}"


def test_a_dead_server_costs_training_nothing_and_sync_ships_the_rest(run, dead_server):
    journal = Journal(run / "journal.jsonl")
    shipper = Shipper(destination(run, uri=dead_server))
    began = time.monotonic()
    shipper.start()
    assert time.monotonic() - began < 0.5
    slowest = 0.0
    for step in range(1, 151):
        before = time.perf_counter()
        write_steps(journal, [step])
        slowest = max(slowest, time.perf_counter() - before)
        time.sleep(0.01)
    assert slowest < 0.5
    began = time.monotonic()
    assert shipper.close(timeout=1.0) == 150
    assert time.monotonic() - began < 2.0
    assert "s3cret" not in f"{shipper.error}"
    assert sync(destination(run)) == 150
    assert arrived(run) == journalled(run)


def test_sync_says_in_one_line_that_the_server_is_away_and_keeps_credentials_to_itself(run):
    write_steps(Journal(run / "journal.jsonl"), [1])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        with pytest.raises(UserError) as error:
            sync(destination(run, uri=f"http://user:s3cret@127.0.0.1:{port}"))
    message = str(error.value)
    assert f"to MLflow at http://127.0.0.1:{port} (1 lines left): ConnectionRefusedError: " in message
    assert "start the server or correct tracking.uri" in message
    assert "s3cret" not in message
    assert "\n" not in message


def test_when_the_store_comes_back_everything_arrives_once(run, tmp_path):
    """The folder of the store is missing and cannot be made, because a file is in its place, until the file goes."""
    place = tmp_path / "store"
    place.write_text("in the way")
    uri = f"sqlite:///{place}/mlflow.db"
    journal = Journal(run / "journal.jsonl")
    shipper = Shipper(destination(run, uri=uri))
    shipper.start()
    write_steps(journal, range(1, 6))
    end = time.monotonic() + 30
    while shipper.error is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert "FileExistsError" in shipper.error or "NotADirectoryError" in shipper.error
    place.unlink()
    write_steps(journal, range(6, 11))
    assert shipper.close(timeout=60) == 0, shipper.error
    assert shipper.error is None
    assert arrived(run, uri) == journalled(run)


SYNC = """
import sys
from dtrain.tracking.journal import Journal
from dtrain.tracking.mlflow import Destination, default_uri, sync
run = sys.argv[1]
journal = f"{run}/journal.jsonl"
Journal(journal).append("train", 1, 8, {"loss": 0.5})
print(sync(Destination(journal, default_uri(run), "digits", "name", run.split("/")[-1])))
"""


@pytest.mark.campaign
def test_two_runs_create_the_store_at_the_same_time_and_in_silence(tmp_path):
    """MLflow, alembic and git say nothing on the user's terminal, and leave nothing where the command was given."""
    from mlflow import MlflowClient

    for name in ("a", "b", "elsewhere"):
        (tmp_path / name).mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    environment["PYTHONPATH"] = os.getcwd()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SYNC, str(tmp_path / name)],
            cwd=tmp_path / "elsewhere",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    assert [process.communicate(timeout=60) for process in processes] == [("1\n", ""), ("1\n", "")]
    assert list((tmp_path / "elsewhere").iterdir()) == []
    client = MlflowClient(default_uri(tmp_path / "a"))
    experiment = client.get_experiment_by_name("digits")
    found = client.search_runs([experiment.experiment_id])
    assert sorted(f.data.tags["dtrain.run_key"] for f in found) == ["a", "b"]


def test_neither_the_shipper_nor_training_waits_for_the_import_of_mlflow():
    code = "import sys, dtrain.tracking.mlflow; print(sorted({'torch', 'mlflow'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
