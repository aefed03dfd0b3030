"""A sweep in MLflow: one parent run below the training's own, and a child run for every combination."""

from pathlib import Path
from typing import Any

from dtrain.files import within
from dtrain.tracking.mlflow.address import alone_with, milliseconds
from dtrain.tracking.mlflow.keys import allowed

PARENT, RUN_KEY, SWEEP_OF = "mlflow.parentRunId", "dtrain.run_key", "dtrain.sweep_of"


class Sweeps:
    """The sweep of MLflow run `run_id`, made when its first combination is sent. Every method talks to MLflow.

    directory: of the run, held while a combination is sent: the tasks of a job array end at the same time.
    """

    def __init__(self, client, experiment_id: str, run_id: str, name: str, key: str, directory: Path):
        self._client, self._experiment, self._directory = client, experiment_id, directory
        self._training, self._name, self._key = run_id, name, key
        self._parent: str | None = None
        self._done: set[str] = set()  # keys of the lines that are there whole, as far as is known
        self._begun: dict[str, str] = {}  # key of a line that is there in part → run id

    def send(self, line: dict[str, Any]) -> bool:
        """A combination's child run; whether it was not there."""
        key = f"{self._key}.sweep.{line['key'][:16]}"
        if key in self._done:
            return False
        with alone_with(self._directory):
            self._look(line["time"])
            return key not in self._done and self._send(line, key)

    def _send(self, line: dict[str, Any], key: str) -> bool:
        from mlflow.entities import Metric, Param

        context = line["context"]
        setting = {"checkpoint": line["step"], **{k: v for k, v in context.items() if not isinstance(v, dict | list)}}
        name = ", ".join(f"{k} {v}" for k, v in line.get("setting", {}).items()) or f"step {line['step']}"
        run_id = self._begun.get(key) or self._create(name, key, self._parent, line["time"])
        time_ms = milliseconds(line["time"])
        metrics = [Metric(allowed(k), float(v), time_ms, line["step"]) for k, v in line["metrics"].items()]
        params = [Param(allowed(k), str(v)) for k, v in setting.items()]
        self._client.log_batch(run_id, metrics=metrics, params=params, synchronous=True)
        self._client.set_terminated(run_id, "FINISHED", time_ms)
        self._client.set_terminated(self._parent, "FINISHED", time_ms)
        self._done.add(key)
        return True

    def send_picture(self, picture: Path) -> None:
        if self._parent is not None and within(picture.parent, picture.name) is not None:
            self._client.log_artifact(self._parent, str(picture))

    def _look(self, time: float) -> None:
        """Find what is there of the sweep, or begin it."""
        found, token = [], None
        while True:
            page = self._client.search_runs(
                [self._experiment], f"tags.`{SWEEP_OF}` = '{self._key}'", max_results=1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                break
        mine = {run.data.tags[RUN_KEY]: run for run in sorted(found, key=lambda run: len(run.data.metrics))}
        parent = mine.pop(f"{self._key}.sweep", None)
        if parent is None:
            name = f"{self._name} sweep"
            self._parent = self._create(name, f"{self._key}.sweep", self._training, time)
        else:
            self._parent = parent.info.run_id
            self._hang_below(self._training, parent)
        for run in mine.values():
            self._hang_below(self._parent, run)
        self._done = {key for key, run in mine.items() if run.info.status == "FINISHED"}
        self._begun = {key: run.info.run_id for key, run in mine.items() if key not in self._done}

    def _hang_below(self, parent: str, run) -> None:
        """The one that it hung below may have been deleted, and made anew."""
        if run.data.tags.get(PARENT) != parent:
            self._client.set_tag(run.info.run_id, PARENT, parent, synchronous=True)

    def _create(self, name: str, key: str, parent: str, time: float) -> str:
        tags = {PARENT: parent, RUN_KEY: key, SWEEP_OF: self._key}
        run = self._client.create_run(self._experiment, milliseconds(time), tags, run_name=name)
        return run.info.run_id
