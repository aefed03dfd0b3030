"""The main job as people start it: the real `deepspeed` launcher, two ranks, MLflow on SQLite, a kill in the middle."""

import json
import os
import signal
import time

import pytest

from dtrain.tracking.journal import events, read
from tests.digits import losses, tiny
from tests.end_to_end.launched import launch
from tests.processes import processes_of
from tests.ranks import run_ranks
from tests.training.runs import train


@pytest.mark.launcher
def test_a_launched_run_killed_and_launched_again_ends_as_if_nothing_had_happened(digits, tmp_path):
    overrides = ("train.steps=40", "train.checkpoint_every=5", "eval.every=20", "data.workers=1")
    whole = tiny(digits, tmp_path / "whole", *overrides)
    run_ranks(train, 2, whole)

    folder = tmp_path.resolve()
    config = tiny(digits, folder / "runs", *overrides, "tracking.enabled=true")
    (folder / "tiny.yaml").write_text(config.dump())
    process = launch(folder, "tiny.yaml")
    journal = config.run.path / "journal.jsonl"
    end = time.monotonic() + 120
    while not any(e["event"] == "train" and e["step"] >= 12 for e in events(journal)):
        assert process.poll() is None, (folder / "launcher.log").read_text()
        assert time.monotonic() < end, (folder / "launcher.log").read_text()
        time.sleep(0.01)
    for pid in processes_of(folder):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (config.run.path / "outcome.json").exists()  # a crash leaves none

    assert launch(folder, "tiny.yaml").wait(120) == 0, (folder / "launcher.log").read_text()
    assert processes_of(folder) == []
    assert losses(config) == losses(whole)  # bit for bit
    assert json.loads((config.run.path / "outcome.json").read_text()) == {
        "outcome": "finished",
        "step": 40,
        "attempt": 2,
    }
    log = (folder / "launcher.log").read_text()
    assert "going on after step" in log
    assert "fd_pixels of ema_0, 48 samples, 5 ddim steps" in log
    assert (config.run.path / "logs" / "rank-1.log").exists()
    assert arrived_in_mlflow(config, folder) == journalled(config)


def journalled(config) -> dict[str, dict[int, float]]:
    keys = {}
    for line in read(config.run.path / "journal.jsonl"):
        for name, value in line["metrics"].items():
            key = f"eval/ema_0/n48/{name}" if line["event"] == "eval" else f"{line['event']}/{name}"
            if name in ("loss", "fd_pixels"):
                keys.setdefault(key, {})[line["step"]] = value
    return keys


def arrived_in_mlflow(config, folder) -> dict[str, dict[int, float]]:
    """key → step → value of the one MLflow run; fails where a step came twice or a grid is missing."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("dtrain")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "tiny"
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "32"
    grids = [f.path for f in client.list_artifacts(run.info.run_id, "images") if f.path.endswith(".webp")]
    series = sorted(path.split("+")[:3] for path in grids if "~samples+" in path)
    assert series == [["images/eval~ema_0~n48~samples", "step", n] for n in ("20", "40")]
    keys = {}
    for key in ("train/loss", "eval/ema_0/n48/fd_pixels"):
        history = client.get_metric_history(run.info.run_id, key)
        keys[key] = {m.step: m.value for m in history}
        assert len(keys[key]) == len(history), f"{key} holds a step twice"
    return keys


@pytest.mark.launcher
@pytest.mark.campaign  # 13 s; forked ranks show the same in every run of the suite
def test_a_mistake_under_the_launcher_is_said_once_with_exit_code_2(digits, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny(digits, tmp_path / "runs").dump())
    assert launch(tmp_path, "tiny.yaml", "data.batch_size=25").wait(120) == 2
    said = [line for line in (tmp_path / "launcher.log").read_text().splitlines() if "data.batch_size 25" in line]
    assert [line for line in said if "cmd" not in line] == [
        "dtrain: data.batch_size 25 does not divide by 2 ranks; the nearest that does is 24"
    ]
    assert not (tmp_path / "runs").exists()
