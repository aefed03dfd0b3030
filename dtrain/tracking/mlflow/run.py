"""One run in MLflow, how far it has got, and what a journal line becomes there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.tracking.mlflow.address import allowed, alone_with, milliseconds, open_client
from dtrain.tracking.mlflow.files import Files, files_of
from dtrain.tracking.mlflow.link import keep_ids
from dtrain.tracking.mlflow.models import Models
from dtrain.tracking.mlflow.sweeps import RUN_KEY, Sweeps

METRICS_PER_BATCH = 1000  # MLflow's limits for one request
PARAMS_PER_BATCH = 100
LONGEST_TAG = 5000
AT_THE_END = "report.html"  # uploaded when a run ends, or is synced, where there is one


@dataclass(frozen=True)
class Destination:
    """A run and where it goes in MLflow.

    `run_key` identifies the run for ever (letters, digits, `-_.`); `params` is flat and logged once: a key that MLflow
    already has keeps its first value; `tags` are set anew.
    """

    journal_path: Path
    uri: str
    experiment: str
    run_name: str
    run_key: str
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)


def metric_key(line: dict[str, Any], metric: str) -> str:
    """The MLflow key of one metric of a journal line.

    An evaluation's key holds EMA and N, which no curve may mix, and what it changed of the run's own settings.
    """
    event, context = line["event"], line["context"]
    if event == "eval":
        differs = "".join(f"{k}-{v}/" for k, v in context.get("differs", {}).items())
        return allowed(f"eval/{context['ema']}/n{context['n']}/{differs}{metric}")
    return allowed(f"system/{context['node']}/{metric}" if event == "system" else f"{event}/{metric}")


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
        self._highest = {m.key: m.step for m in run.data.to_proto().metrics}  # metric key → highest step there
        self._histories: dict[str, dict[int, int]] = {}  # of evaluations: metric key → step → milliseconds
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

    def finish(self, status: str | None, ended: float) -> None:
        """What is sent last; then the run's end, where it has one (FINISHED, FAILED, KILLED)."""
        self._models.look()
        self._models.mark_removed()
        self._sweeps.send_picture(self._directory / "sweep.png")
        if (self._directory / AT_THE_END).is_file():
            self._files.send_file(AT_THE_END)
        if status is not None:
            self._found()
            self._client.set_terminated(self.id, status=status, end_time=milliseconds(ended))
            self._status = status

    def send(self, lines: list[dict[str, Any]]) -> int:
        """Ship the first lines, one request's worth; how many are dealt with."""
        from mlflow.entities import Metric

        if lines[0]["event"] == "sweep":
            self.lines_shipped += self._sweeps.send(lines[0])
            return 1
        highest = dict(self._highest)
        metrics: dict[tuple[str, int], Metric] = {}
        taken, news = 0, set()
        for number, line in enumerate(lines):
            if line["event"] == "sweep":
                break
            if line["event"] == "checkpoint" and self._models.add(line):
                news.add(number)
            step, time_ms = line["context"].get("sample", line["step"]), milliseconds(line["time"])
            new = {}
            for name, value in line["metrics"].items():
                key = metric_key(line, name)
                wanted = step > highest.get(key, -1) or (line["event"] == "eval" and self._lacks(key, step, time_ms))
                if wanted and (key, step) not in metrics:
                    model = self._models.id_of(step) if line["event"] == "eval" else None
                    new[key, step] = Metric(key, float(value), time_ms, step, model)
            if metrics and len(metrics) + len(new) > METRICS_PER_BATCH:
                break
            metrics |= new
            highest |= {key: max(step, highest.get(key, -1)) for key, step in new}
            taken += 1
            if new:
                news.add(number)
        if metrics:
            self._client.log_batch(self.id, metrics=list(metrics.values()), synchronous=True)
        self._highest = highest
        for (key, step), metric in metrics.items():
            if key in self._histories:
                self._histories[key][step] = metric.timestamp
            if metric.model_id is not None:
                self._models.has(step, key)
        for number, line in enumerate(lines[:taken]):
            if self._files.send(line):
                news.add(number)
        self.lines_shipped += len(news)
        return taken

    def _lacks(self, key: str, step: int, time_ms: int) -> bool:
        """Whether an evaluation's value is not there: it may be of an older step than the newest that is.

        Also where only the run has it, because the request that should have given it to the model too was cut off.
        """
        if key not in self._histories:
            self._histories[key] = {m.step: m.timestamp for m in self._client.get_metric_history(self.id, key)}
        there = self._histories[key].get(step)
        return there is None or (there == time_ms and self._models.lacks(step, key))

    def _found(self):
        """This run in MLflow, or None; an empty one beside it, of a request whose answer was lost, is deleted."""
        runs = self._client.search_runs([self._experiment], f"tags.`{RUN_KEY}` = '{self._to.run_key}'")
        runs = sorted(runs, key=lambda run: (run.info.run_id != self.id, -len(run.data.metrics), run.info.run_id))
        for empty in runs[1:]:
            if not empty.data.metrics:
                self._client.delete_run(empty.info.run_id)
        return runs[0] if runs else None
