"""A run's record: on rank 0 the journal, and the thread that ships it to MLflow; on other ranks a journal of their own
for what rank 0 cannot know."""

import uuid
from typing import Any

from dtrain.config import Config, flat
from dtrain.run import Position, RunDirectory
from dtrain.tracking.journal import Journal, events
from dtrain.tracking.mlflow import Shipper, default_uri
from dtrain.tracking.mlflow import sync as sync_journal

CLOSE_SECONDS = 30.0  # how long the end of a run waits for a slow tracking server


class Tracker:
    def __init__(self, run: RunDirectory, rank: int):
        self._run = run
        self._journal = Journal(run.journal_file) if rank == 0 else None
        self._own = self._journal or Journal(run.journal_file, rank)
        self._shipper: Shipper | None = None
        self._shipping = False

    @property
    def attempt(self) -> int:
        return self._journal.attempt

    def begin(self, config: Config, position: Position, changes: dict[str, tuple], context: dict[str, Any]) -> None:
        """Record that an attempt starts at `position`, and what its config changes; start shipping."""
        if self._journal is None:
            return
        context = context | {"run_key": run_key(self._run) or uuid.uuid4().hex}
        self._journal.begin_attempt(position.step, position.images, context)
        if changes:
            self.write("config", position, context={"changed": {k: list(v) for k, v in changes.items()}})
        if config.tracking.enabled:
            self._shipper = Shipper(**destination(self._run, config))

    def write(self, event: str, position: Position, metrics: dict | None = None, context: dict | None = None) -> None:
        if self._journal is not None:
            self._journal.append(event, position.step, position.images, metrics, context)
            if event == "train":
                self._ship()

    def _ship(self) -> None:
        """Begin when there is a curve: importing MLflow takes seconds, in which the first step would have to wait."""
        if self._shipper is not None and not self._shipping:
            self._shipping = True
            self._shipper.start()

    def write_own(self, event: str, position: Position, context: dict) -> None:
        """What this rank alone knows, in its own journal; the attempt is the one rank 0 began."""
        if self._own.attempt is None:
            # Of rank 0's journal: who calls this has heard of rank 0 since it began.
            self._own.attempt = max((line["attempt"] for line in events(self._run.journal_file)), default=0)
        self._own.append(event, position.step, position.images, context=context)

    def close(self, finished: bool) -> int:
        """Ship what can be shipped soon; returns the number of journal lines that could not be."""
        if self._journal is not None:
            self._journal.close()
        self._own.close()
        if self._shipper is None:
            return 0
        self._ship()
        return self._shipper.close(CLOSE_SECONDS, status="FINISHED" if finished else "KILLED")


def sync(run: RunDirectory) -> int:
    """Send the journal lines that MLflow does not have; how many. Raises UserError when MLflow cannot be reached."""
    ended = run.outcome()
    status = None if ended is None else "FINISHED" if ended["outcome"] == "finished" else "KILLED"
    return sync_journal(**destination(run, run.config()), status=status)


def tracking_uri(run: RunDirectory, config: Config) -> str:
    return config.tracking.uri or default_uri(run.path)


def run_key(run: RunDirectory) -> str | None:
    """What the run's MLflow run is found by: drawn at its first start, in the journal ever since."""
    keys = [line["context"]["run_key"] for line in events(run.journal_file) if line["event"] == "attempt"]
    return keys[0] if keys else None


def destination(run: RunDirectory, config: Config) -> dict[str, Any]:
    """The arguments by which a Shipper, or `sync`, finds this run in MLflow."""
    attempts = [line for line in events(run.journal_file) if line["event"] == "attempt"]
    return {
        "journal_path": run.journal_file,
        "uri": tracking_uri(run, config),
        "experiment": config.tracking.experiment,
        "run_name": config.run.name,
        "run_key": run_key(run) or run.path.name,
        "params": flat(config.model_dump(mode="json")),
        "tags": {"dtrain.data": attempts[-1]["context"]["data"], "dtrain.attempts": len(attempts)} if attempts else {},
    }
