"""The tracking server absent at start, broken, paused, killed and back: nothing waits, and all arrives once."""

import re
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from dtrain.run import RunDirectory
from dtrain.tracking.journal import Journal, read
from dtrain.tracking.mlflow import Destination, Shipper, shipper, sync
from dtrain.tracking.tracker import sync as sync_run
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.tracking.servers import Rest

EXPERIMENT = "outages"
connections: list[tuple] = []  # (thread, address) of each that is opened


def listen(event, arguments):
    if event == "socket.connect":
        connections.append((threading.current_thread().name, arguments[1]))


sys.addaudithook(listen)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setattr(shipper, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(shipper, "LONGEST_BACK_OFF_SECONDS", 1.0)


class Training:
    """What a training does to its tracking: a line a step, now and then an evaluation or a checkpoint."""

    def __init__(self, path: Path, uri: str):
        path.mkdir()
        (path / "samples").mkdir()
        (path / "checkpoints").mkdir()
        self.path, self.step = path, 0
        self.journal = Journal(path / "journal.jsonl")
        self.journal.begin_attempt(0, 0)
        self.destination = Destination(self.journal.path, uri, EXPERIMENT, path.name, f"key-of-{path.name}", {"a": 1})
        self.shipper = Shipper(self.destination)
        self.slowest = 0.0

    def take(self, steps: int) -> None:
        for _ in range(steps):
            before = time.perf_counter()
            self.step += 1
            self.journal.append("train", self.step, 8 * self.step, {"loss": 1 / self.step, "lr": 1e-3})
            self.slowest = max(self.slowest, time.perf_counter() - before)
            time.sleep(0.005)

    def save(self) -> None:
        name = f"step-{self.step:08d}"
        (self.path / "checkpoints" / name).mkdir()
        self.journal.append("checkpoint", self.step, 0, {"seconds": 0.1}, {"path": name, "hash": f"h{self.step}"})

    def evaluate(self) -> None:
        name = f"samples/step-{self.step}.png"
        Image.new("L", (8, 8), self.step % 256).save(self.path / name)
        context = {"ema": "ema_0", "n": 100, "artifact": name}
        self.journal.append("eval", self.step, 0, {"fd_pixels": 100 / self.step}, context)

    def journalled(self) -> dict:
        found: dict = {}
        for line in read(self.journal.path):
            if line["event"] == "checkpoint":
                continue  # how long it took is no curve
            for name, value in line["metrics"].items():
                key = "eval/ema_0/n100/fd_pixels" if line["event"] == "eval" else f"{line['event']}/{name}"
                found.setdefault(key, []).append((line["step"], round(1000 * line["time"]), value))
        return found

    def steps_of(self, event: str) -> list[int]:
        return [line["step"] for line in read(self.journal.path) if line["event"] == event]


def goes_on_until(condition, trainings, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, [t.shipper.error for t in trainings]
        for training in trainings:
            training.take(5)


def test_nothing_waits_nothing_is_lost_and_nothing_doubled(server, proxy, tmp_path):
    server.stop()
    direct, proxied = trainings = [Training(tmp_path / "direct", server.url), Training(tmp_path / "proxied", proxy.url)]
    rest = Rest(server.url)
    connections.clear()

    def failing() -> bool:
        return all(t.shipper.error for t in trainings)

    def well() -> bool:
        return all(t.shipper.error is None and t.shipper.run_id for t in trainings)

    def everything(something: str) -> None:
        for training in trainings:
            training.take(3)
            if "save" in something:
                training.save()
            if "evaluate" in something:
                training.evaluate()

    for training in trainings:  # absent at start
        training.shipper.start()
    everything("save, evaluate")
    goes_on_until(failing, trainings)
    assert re.search("Connection (refused|reset)", direct.shipper.error)  # reset: of one that was still in its queue
    server.begin()
    goes_on_until(well, trainings)

    proxy.broken = True  # an answer of 500
    everything("save, evaluate")
    goes_on_until(lambda: proxied.shipper.error is not None and proxy.refused >= 2, trainings)
    assert "500" in proxied.shipper.error
    assert direct.shipper.error is None
    proxy.broken = False
    goes_on_until(well, trainings)

    server.pause()  # connections are taken, answers do not come
    everything("save")
    goes_on_until(failing, trainings)
    assert "timed out" in direct.shipper.error
    everything("save")
    server.go_on()
    goes_on_until(well, trainings)

    server.stop()  # killed in whatever it does
    everything("save, evaluate")
    goes_on_until(failing, trainings)
    ended = Training(tmp_path / "ended", server.url)  # a run that ends meanwhile
    ended.shipper.start()
    ended.take(5)
    assert ended.shipper.close(timeout=0.5) == 5
    server.begin()
    goes_on_until(well, trainings)
    everything("evaluate")

    networked = {thread for thread, _ in connections}
    assert [t.shipper.close(timeout=60, status="FINISHED") for t in trainings] == [0, 0], failing()
    assert sync(ended.destination, "KILLED") == 5
    assert sync(ended.destination) == 0
    assert "mlflow-shipper" in networked
    assert "MainThread" not in networked  # the loop's: it opens no connection
    assert max(t.slowest for t in trainings) < 1.5  # half of what one request waits
    for training in [*trainings, ended]:
        run = rest.run(EXPERIMENT, training.path.name)  # one, not several
        assert rest.history(run) == training.journalled()
        assert run["info"]["status"] == ("KILLED" if training is ended else "FINISHED")
        models = {int(m["data"]["params"][-1]["value"]): m for m in rest.models(run)}
        assert sorted(models) == training.steps_of("checkpoint")
        assert len(rest.models(run)) == len(models)
        images = [Path(f).name for f in rest.artifacts(run, "images") if f.endswith(".png") and "~samples+" in f]
        assert sorted(int(name.split("+")[2]) for name in images) == training.steps_of("eval")


def watched_training(config):
    """(journal lines of steps, threads that connected to MLflow, seconds from the last step to the end)."""
    from dtrain.tracking import tracker
    from dtrain.training.run_training import train

    tracker.CLOSE_SECONDS = 1.0
    connections.clear()
    outcome = train(config)
    ended = time.time()
    lines = [line for line in read(config.run.path / "journal.jsonl") if line["event"] == "train"]
    port = int(config.tracking.uri.rpartition(":")[2])
    threads = {thread for thread, address in connections if address[-1] == port}
    return outcome, [line["step"] for line in lines], threads, ended - lines[-1]["time"]


@pytest.mark.campaign
def test_a_real_training_beside_a_paused_server_connects_from_no_thread_that_trains(
    server, digits, tmp_path, monkeypatch
):
    server.start()
    server.pause()
    try:
        # A step is milliseconds here: enough of them for MLflow's import, which takes seconds, to end in between.
        more = ("tracking.enabled=true", f"tracking.uri={server.url}", "train.steps=400", "eval.every=100")
        config = tiny(digits, tmp_path, *more, "train.checkpoint_every=100")
        ((outcome, steps, threads, waited),) = run_ranks(watched_training, 1, config)
    finally:
        server.go_on()
    assert outcome == "finished"
    assert steps == list(range(1, 401))
    assert threads == {"mlflow-shipper"}
    assert waited < 20  # saving, the last evaluation and one second for MLflow, not a request's time-outs
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    run = RunDirectory(config.run.path)
    assert sync_run(run) > 400
    assert sync_run(run) == 0
    history = Rest(server.url).history(Rest(server.url).run("dtrain", "tiny"))
    assert [step for step, _, _ in history["train/loss"]] == steps
