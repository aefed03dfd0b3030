"""One run in MLflow, how far it has got, and what a journal line becomes there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.files import within
from dtrain.tracking import energy
from dtrain.tracking.mlflow.address import alone_with, milliseconds, open_client
from dtrain.tracking.mlflow.curves import Curves
from dtrain.tracking.mlflow.datasets import Datasets
from dtrain.tracking.mlflow.description import NOTE, Landmarks, description, goodput, headline, merged
from dtrain.tracking.mlflow.experiment import preset, runs_page
from dtrain.tracking.mlflow.files import Files, files_of
from dtrain.tracking.mlflow.keys import allowed
from dtrain.tracking.mlflow.link import MODEL_TRAINING, keep_ids, run_page
from dtrain.tracking.mlflow.models import Models
from dtrain.tracking.mlflow.sweeps import RUN_KEY, Sweeps

METRICS_PER_BATCH = 1000  # MLflow's limits for one request
PARAMS_PER_BATCH = 100
LONGEST_TAG = 5000
CONFIG, GOODPUT, ENERGY = "config.yaml", "dtrain.goodput", "dtrain.energy"
AT_THE_END = "report.html"  # uploaded when a run ends, or is synced, where there is one


@dataclass(frozen=True)
class Destination:
    """A run and where it goes in MLflow.

    `run_key` identifies the run for ever (letters, digits, `-_.`); `params` is flat and logged once: a key that MLflow
    already has keeps its first value; `tags` are set anew. `datasets` are what it trains on: name, hash, source and
    samples; `reference` is what it is measured against: name and source.
    """

    journal_path: Path
    uri: str
    experiment: str
    run_name: str
    run_key: str
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    reference: dict[str, Any] | None = None
    carbon_intensity: float | None = None  # g of CO₂ a kWh


def has_news(line: dict[str, Any]) -> bool:
    """Whether a journal line holds something for MLflow."""
    return bool(line["metrics"] or files_of(line) or line["event"] == "checkpoint")


class Run:
    """Every method but `__init__` talks to MLflow, blocks, and may raise; then `connect` again."""

    def __init__(self, to: Destination):
        self._to = to
        self._directory = Path(to.journal_path).parent
        self._params = {allowed(k): str(v) for k, v in to.params.items()}
        self._tags = {allowed(k): str(v)[:LONGEST_TAG] for k, v in to.tags.items()} | {RUN_KEY: to.run_key}
        self.id: str | None = None
        self.lines_shipped = 0
        self._refused: dict[str, str] = {}
        self._status = "RUNNING"

    def connect(self, started: float) -> None:
        """Find the run by its key, or create it as of `started` (unix seconds), and read how far it has got."""
        self._client, self._experiment = client, experiment = open_client(self._to.uri, self._to.experiment)
        with alone_with(self._directory):
            run = self._found()
            if run is None:
                run = client.create_run(experiment, milliseconds(started), self._tags, run_name=self._to.run_name)
            self._describe(run)
        self.id, self._status = run.info.run_id, run.info.status
        keep_ids(self._directory, self._to.uri, experiment, self.id)
        self._curves = Curves(client, run, self._refused)
        self._datasets = Datasets(client, run)
        self._datasets.log(self._to.datasets, "training")
        self._described: Any = ()  # of which evaluation; () before any description
        preset(client, experiment, None)
        self._files = Files(client, self.id, self._directory)
        self._models = Models(client, experiment, self.id, self._to.run_name, self._directory / "checkpoints")
        self._sweeps = Sweeps(client, experiment, self.id, self._to.run_name, self._to.run_key, self._directory)

    def _describe(self, run) -> None:
        """Params that are not there yet, and tags."""
        from mlflow.entities import Param, RunTag

        # A param cannot change in MLflow; a resumed run with other values keeps the first and says so in a tag.
        missing = [Param(k, v) for k, v in self._params.items() if k not in run.data.params]
        for i in range(0, len(missing), PARAMS_PER_BATCH):
            self._client.log_batch(run.info.run_id, params=missing[i : i + PARAMS_PER_BATCH], synchronous=True)
        stale = [RunTag(k, v) for k, v in self._tags.items() if run.data.tags.get(k) != v]
        for i in range(0, len(stale), PARAMS_PER_BATCH):
            self._client.log_batch(run.info.run_id, tags=stale[i : i + PARAMS_PER_BATCH], synchronous=True)

    def set_running(self) -> None:
        if self._status != "RUNNING":
            self._client.update_run(self.id, status="RUNNING")
            self._status = "RUNNING"

    def finish(self, status: str | None, ended: float, landmarks: Landmarks) -> None:
        """What is sent last; then the run's end, where it has one (FINISHED, FAILED, KILLED)."""
        self._models.look()
        self._models.mark_removed()
        self._sweeps.send_picture(self._directory / "sweep.png")
        if within(self._directory, AT_THE_END) is not None:
            self._files.send_changed(AT_THE_END)
        self.describe(landmarks, final=True)
        if status == "FINISHED" and (newest := headline(landmarks.evaluations)):
            self._files.send_last_image(newest[1])
        if status is not None:
            self._found()
            self._client.set_terminated(self.id, status=status, end_time=milliseconds(ended))
            self._status = status

    def describe(self, landmarks: Landmarks, final: bool = False) -> None:
        """Bring the run's first page and the experiment's view up to date, where there is a new evaluation or `final`.

        What a user wrote below our part of the description stays.
        """
        found = headline(landmarks.evaluations)
        failure = landmarks.failure
        newest = found and (found[1]["step"], found[1]["time"]), failure and failure["time"]
        if newest == self._described and not final:
            return
        tags = {}
        if landmarks.totals:
            tags[GOODPUT] = goodput(landmarks.totals.values())
        taken = energy.total(energy.by_attempt(self._to.journal_path).values())
        if told := energy.said(taken, self._to.carbon_intensity):
            tags[ENERGY] = told
        there = self._client.get_run(self.id).data.tags
        tags[NOTE] = merged(description(landmarks, self._links()), there.get(NOTE))
        for key, value in tags.items():
            if there.get(key) != value:
                self._client.set_tag(self.id, key, value, synchronous=True)
        if found:
            metric, line = found
            preset(self._client, self._experiment, self._curves.key(line, metric))
            if self._to.reference is not None and "reference" in line["context"]:
                self._datasets.log([self._to.reference | {"hash": line["context"]["reference"]}], "evaluation")
        self._described = newest

    def _links(self) -> dict[str, str]:
        """Addresses within the server."""
        links = {
            "Curves and samples": run_page(self._experiment, self.id),
            "All runs by distance": runs_page(self._experiment),
            "Checkpoints by distance": f"#/experiments/{self._experiment}/models?{MODEL_TRAINING}",
        }
        if (self._directory / AT_THE_END).is_file():
            links["Report"] = f"#/experiments/{self._experiment}/runs/{self.id}/artifacts/{AT_THE_END}?{MODEL_TRAINING}"
        return links

    def send(self, lines: list[dict[str, Any]]) -> int:
        """Ship the first lines, one request's worth; how many are dealt with."""
        if lines[0]["event"] == "sweep":
            self.lines_shipped += self._sweeps.send(lines[0])
            return 1
        metrics: dict[tuple[str, int], Any] = {}
        taken, of_line, news = 0, {}, set()  # of_line: key and step → number of the line
        for number, line in enumerate(lines):
            if line["event"] == "sweep":
                break
            if line["event"] == "checkpoint" and self._models.add(line):
                news.add(number)
            new = {at: metric for at, metric in self._lacking(line).items() if at not in metrics}
            if metrics and len(metrics) + len(new) > METRICS_PER_BATCH:
                break
            metrics |= new
            of_line |= dict.fromkeys(new, number)
            taken += 1
        for metric in self._curves.log(list(metrics.values())):
            news.add(of_line[metric.key, metric.step])
            if metric.model_id is not None:
                self._models.has(metric.step, metric.key)
        for number, line in enumerate(lines[:taken]):
            if self._files.send(line):
                news.add(number)
        if within(self._directory, CONFIG) is not None:
            self._files.send_changed(CONFIG)
        self.lines_shipped += len(news)
        return taken

    def _lacking(self, line: dict[str, Any]) -> dict:
        """(key, step) → metric, of what the line has and MLflow does not."""
        from mlflow.entities import Metric

        step, time_ms = line["context"].get("sample", line["step"]), milliseconds(line["time"])
        found, hole = {}, None
        for name, value in line["metrics"].items():
            key, model = self._curves.key(line, name), None
            if key is None:
                continue
            wanted = step > self._curves.highest.get(key, -1)
            if line["event"] == "eval":
                model = self._models.id_of(step)
                wanted = wanted or self._curves.lacks(key, step, time_ms, self._models.lacks(step, key))
            elif not wanted:
                # A long curve's history takes a while to ask for: the line's first curve speaks for the others.
                hole = self._curves.has_hole(key, step) if hole is None else hole
                wanted = hole and self._curves.has_hole(key, step)
            if wanted:
                found[key, step] = Metric(key, float(value), time_ms, step, model)
        return found

    def _found(self):
        """This run in MLflow, or None; an empty one beside it, of a request whose answer was lost, is deleted."""
        runs = self._client.search_runs([self._experiment], f"tags.`{RUN_KEY}` = '{self._to.run_key}'")
        runs = sorted(runs, key=lambda run: (run.info.run_id != self.id, -len(run.data.metrics), run.info.run_id))
        for empty in runs[1:]:
            if not empty.data.metrics:
                self._client.delete_run(empty.info.run_id)
        return runs[0] if runs else None
