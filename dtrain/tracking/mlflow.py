"""Ships the journal to MLflow: the only place that knows MLflow (design, decision 6).

A thread reads the journal and sends its valid lines with their own timestamps. Training never waits for it: a server
that is slow, away or broken only makes the thread try again. What is sent depends on what is there: a metric key goes
on after the highest step that MLflow holds of it, so neither a restart, nor an attempt that goes through old steps
again, nor an answer lost on the way doubles anything. What is left when the run ends is shipped by `sync`.

    event "train", metric "loss"                                  train/loss
    event "eval", context {"ema": "0.999", "n": 2000}             eval/0.999/n2000/fd_pixels
    any other event                                               <event>/<metric>
A file that an event's context names as `artifact` (relative to the run directory) is uploaded under the same path.
"""

import fcntl
import logging
import os
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtrain.errors import UserError
from dtrain.tracking.journal import Tail, events, valid

RUN_KEY = "dtrain.run_key"  # the tag by which a resumed run finds its MLflow run
METRICS_PER_BATCH = 1000  # MLflow's limits for one request
PARAMS_PER_BATCH = 100
POLL_SECONDS = 2.0
LONGEST_BACK_OFF_SECONDS = 60.0

# Set where the user has not: our own back-off replaces retries inside one call (MLflow's default blocks for minutes),
# and MLflow, alembic and GitPython keep off the terminal. MLflow reads them when it is imported or at each call.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def default_uri(run_dir: str | Path) -> str:
    """The tracking store where none is configured: SQLite beside the runs, so that all runs of a folder compare."""
    return f"sqlite:///{Path(run_dir).absolute().parent}/mlflow.db"


def metric_key(line: dict[str, Any], metric: str) -> str:
    """The MLflow key of one metric of a journal line. An evaluation's key holds EMA and N, which no curve may mix."""
    event, context = line["event"], line["context"]
    key = f"eval/{context['ema']}/n{context['n']}/{metric}" if event == "eval" else f"{event}/{metric}"
    return _allowed(key)


class Shipper:
    """A daemon thread that keeps MLflow up to date with the journal, from `start` to `close`.

    `run_key` identifies the run for ever (letters, digits, `-_.`); `params` is flat and logged once: a key that MLflow
    already has keeps its first value; `tags` are set anew. `run_id` is None until MLflow has answered. `error` is the
    reason of the last failure, free of credentials; None when all goes well.
    """

    def __init__(
        self,
        journal_path: str | Path,
        uri: str,
        experiment: str,
        run_name: str,
        run_key: str,
        params: dict[str, Any],
        tags: dict[str, Any],
    ):
        self._run = _Run(Path(journal_path).parent, uri, experiment, run_name, run_key, params, tags)
        self._tail = Tail(journal_path)
        self._pending: list[dict[str, Any]] = []  # valid lines with something to ship, not yet known to be in MLflow
        self._lock = threading.Lock()  # for the two above
        self._started = self._ended = time.time()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._status = "FINISHED"
        self._thread = threading.Thread(target=self._work, name="mlflow-shipper", daemon=True)
        self.error: str | None = None

    @property
    def run_id(self) -> str | None:
        return self._run.id

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float, status: str = "FINISHED") -> int:
        """Ship what `timeout` seconds allow and mark the run's end; returns the number of lines left for `sync`."""
        self._deadline = time.monotonic() + timeout
        self._status = status
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        with self._lock:
            return len(self._pending) + len(_shippable(valid(self._tail.read())))

    def _work(self) -> None:
        back_off = 1.0
        connected = False
        while True:
            closing = self._closing.is_set()  # asked before reading, so that no line written before close is missed
            try:
                self._poll()
                if not connected:
                    self._run.connect(self._started)
                    self._run.set_running()
                    connected = True
                self._drain()
                if closing and not self._pending:
                    self._run.finish(self._status, self._ended)
                    self.error = None
                    return
                self.error, back_off, pause = None, 1.0, POLL_SECONDS
            except Exception as e:  # whatever went wrong out there, the journal has it all: say so, and try again
                self.error = _reason(e)
                connected = False
                pause, back_off = back_off, min(2 * back_off, LONGEST_BACK_OFF_SECONDS)
            if not closing:
                self._closing.wait(pause)
            elif time.monotonic() >= self._deadline:
                return
            else:
                time.sleep(min(1.0, pause, max(0.0, self._deadline - time.monotonic())))

    def _poll(self) -> None:
        with self._lock:
            new = self._tail.read()
            if new:
                self._started = min(self._started, new[0]["time"])
                self._ended = new[-1]["time"]
                self._pending = _shippable(valid(self._pending + new))

    def _drain(self) -> None:
        while self._pending and time.monotonic() < self._deadline:
            with self._lock:
                lines = self._pending[:METRICS_PER_BATCH]
            sent = self._run.send(lines)
            with self._lock:
                del self._pending[:sent]


def sync(
    journal_path: str | Path,
    uri: str,
    experiment: str,
    run_name: str,
    run_key: str,
    params: dict[str, Any],
    tags: dict[str, Any],
    status: str | None = None,
) -> int:
    """Ship now, in the foreground, what MLflow does not have yet; the number of journal lines that were new to it.

    `status` (FINISHED, FAILED, KILLED) marks the run's end, where it has ended. Raises UserError when MLflow does not
    take them.
    """
    run = _Run(Path(journal_path).parent, uri, experiment, run_name, run_key, params, tags)
    lines = valid(events(journal_path))
    pending = _shippable(lines)
    try:
        run.connect(lines[0]["time"] if lines else time.time())
        while pending:
            del pending[: run.send(pending[:METRICS_PER_BATCH])]
        if status is not None:
            run.finish(status, lines[-1]["time"] if lines else time.time())
    except Exception as e:
        raise UserError(
            f"cannot ship {journal_path} to MLflow at {_redact(uri)} ({len(pending)} lines left): {_reason(e)}; "
            f"start the server or correct tracking.uri, then run sync again"
        ) from e
    return run.lines_shipped


class _Run:
    """One MLflow run and how far it has got. Every method but `__init__` talks to MLflow, blocks, and may raise."""

    def __init__(self, directory: Path, uri: str, experiment: str, name: str, key: str, params: dict, tags: dict):
        self.directory, self.uri, self.experiment, self.name, self.key = directory, uri, experiment, name, key
        self.params = {_allowed(k): str(v) for k, v in params.items()}
        self.tags = {k: str(v) for k, v in tags.items()} | {RUN_KEY: key}
        self.id: str | None = None
        self.lines_shipped = 0
        self._status = "RUNNING"
        self._highest: dict[str, int] = {}  # metric key → highest step that MLflow holds
        self._artifacts: dict[str, dict[str, int | None]] = {}  # folder → path → bytes, of the folders asked for

    def connect(self, started: float) -> None:
        """Find the run by its key, or create it as of `started` (unix seconds), and read how far it has got."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient  # 2 s
        from mlflow.entities import Param, RunTag

        with _alone_in_database(self.uri) as database:
            self._client = client = MlflowClient(tracking_uri=self.uri)
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                # Left to itself, MLflow puts the artifacts of a SQLite store below the current directory.
                place = (database.parent / "mlartifacts" / self.experiment).as_uri() if database else None
                experiment = client.get_experiment(client.create_experiment(self.experiment, artifact_location=place))
        found = client.search_runs(
            [experiment.experiment_id], f"tags.`{RUN_KEY}` = '{self.key}'", order_by=["attributes.start_time ASC"]
        )
        run = found[0] if found else None
        if run is None:
            run = client.create_run(
                experiment.experiment_id, start_time=_milliseconds(started), tags=self.tags, run_name=self.name
            )
        self.id, self._status, self._artifacts = run.info.run_id, run.info.status, {}
        self._highest = {m.key: m.step for m in run.data.to_proto().metrics}
        # A param cannot change in MLflow; a resumed run with other values keeps the first and journals the change.
        missing = [Param(k, v) for k, v in self.params.items() if k not in run.data.params]
        for i in range(0, len(missing), PARAMS_PER_BATCH):
            client.log_batch(self.id, params=missing[i : i + PARAMS_PER_BATCH], synchronous=True)
        stale = [RunTag(k, v) for k, v in self.tags.items() if run.data.tags.get(k) != v]
        if stale:
            client.log_batch(self.id, tags=stale, synchronous=True)

    def set_running(self) -> None:
        if self._status != "RUNNING":
            self._client.update_run(self.id, status="RUNNING")
            self._status = "RUNNING"

    def finish(self, status: str, ended: float) -> None:
        self._client.set_terminated(self.id, status=status, end_time=_milliseconds(ended))
        self._status = status

    def send(self, lines: list[dict[str, Any]]) -> int:
        """Ship the first lines, one request's worth; how many are dealt with. After an exception, connect again."""
        from mlflow.entities import Metric

        highest = dict(self._highest)
        metrics: list[Metric] = []
        files: list[str] = []
        taken = shipped = 0
        for line in lines:
            step, time_ms = line["step"], _milliseconds(line["time"])
            values = {metric_key(line, name): float(value) for name, value in line["metrics"].items()}
            new = [Metric(k, value, time_ms, step) for k, value in values.items() if step > highest.get(k, -1)]
            if metrics and len(metrics) + len(new) > METRICS_PER_BATCH:
                break
            file = line["context"].get("artifact")
            if file is not None and self._wants(file):
                files.append(file)
                shipped += not new
            metrics += new
            highest |= {m.key: step for m in new}
            taken += 1
            shipped += bool(new)
        if metrics:
            self._client.log_batch(self.id, metrics=metrics, synchronous=True)
        self._highest = highest
        for file in files:
            self._upload(file)
        self.lines_shipped += shipped
        return taken

    def _wants(self, file: str) -> bool:
        """Whether a file of the run directory is there and not yet, or only in part, among the artifacts."""
        local = self.directory / file
        if not local.is_file():
            logging.getLogger(__name__).warning("%s is named in the journal but gone: not sent to MLflow", local)
            return False
        folder = os.path.dirname(file)
        if folder not in self._artifacts:
            present = self._client.list_artifacts(self.id, folder or None)
            self._artifacts[folder] = {f.path: f.file_size for f in present}
        return self._artifacts[folder].get(file) != local.stat().st_size

    def _upload(self, file: str) -> None:
        folder = os.path.dirname(file)
        local = self.directory / file
        self._client.log_artifact(self.id, str(local), folder or None)
        self._artifacts[folder][file] = local.stat().st_size


@contextmanager
def _alone_in_database(uri: str):
    """For a SQLite store, hold its lock file and give its path.

    MLflow takes no lock when it creates its tables, and two runs that start together would both create them.
    """
    if not uri.startswith("sqlite:///"):
        yield None
        return
    database = Path(uri.removeprefix("sqlite:///")).absolute()
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield database


def _shippable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["metrics"] or "artifact" in line["context"]]


def _allowed(key: str) -> str:
    """MLflow refuses a whole batch for one key with another character."""
    return re.sub(r"[^\w\-. /]", "_", key)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _redact(text: str) -> str:
    """Without the user and password of any URL: MLflow's own messages repeat them."""
    return re.sub(r"//[^\s/]*@", "//", text)


def _reason(error: Exception) -> str:
    """What went wrong, in one line: the system's own error ("Connection refused") where one lies underneath."""
    chain = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)
    told = next((e for e in reversed(chain) if isinstance(e, OSError)), error)
    return _redact(f"{type(told).__name__}: {' '.join(str(told).split())}")[:300]
