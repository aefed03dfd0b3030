"""A run's record: on rank 0 the journal, and the thread that ships it to MLflow; on other ranks a journal of their own
for what rank 0 cannot know; on each node how busy it is."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from dtrain import distributed
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.lock import holder
from dtrain.position import Position
from dtrain.run import RunDirectory
from dtrain.tracking.history import KEPT, History
from dtrain.tracking.journal import evaluation_journal, last_line, outline
from dtrain.tracking.lines import parse
from dtrain.tracking.metadata import datasets, params, reference, tags
from dtrain.tracking.mlflow import Destination, Shipper, send_comparison, tracking_uri
from dtrain.tracking.mlflow import sync as sync_journal
from dtrain.tracking.patience import PatientJournal
from dtrain.tracking.provenance import provenance
from dtrain.tracking.system import SystemSampler

CLOSE_SECONDS = 30.0  # how long the end of a run waits for a slow tracking server


class Tracker:
    """attempt: the number of the one that rank 0 has begun, to be told to the others. history: on rank 0 what the
    journal tells beside its curves, from `read_history` on.
    """

    def __init__(self, run: RunDirectory, rank: int):
        self._run, self._rank = run, rank
        self._journal = PatientJournal(run.journal_file) if rank == 0 else None
        self._own = self._journal or PatientJournal(run.journal_file, rank)
        self._shipper: Shipper | None = None
        self._shipping = False
        self._sampler: SystemSampler | None = None
        self._position = Position()
        self.attempt = 0
        self.history = History()

    def read_history(self) -> None:
        """On rank 0, once nobody else writes the journal. Raises UserError and OSError."""
        self.history = History.read(self._run.journal_file)

    def begin(
        self,
        config: Config,
        position: Position,
        changes: dict[str, tuple],
        context: dict[str, Any],
        deepspeed: dict[str, Any],
    ) -> int:
        """Record that an attempt starts at `position`, or that the run goes back there, and what its config changes;
        start shipping. On rank 0 how many steps past `position` the attempt before had done.
        """
        self._position = position
        lost = self.history.lost_steps(position.step)
        self._watch_node(config.tracking.system_every)
        if self._journal is not None:
            try:
                self._begin(config, position, changes, context, deepspeed)
            except OSError as e:
                raise UserError(f"{e if e.strerror is None else e.strerror}; make room in {self._run.path}") from None
        return lost

    def _begin(self, config: Config, position: Position, changes, context, deepspeed) -> None:
        number = self.history.attempt + 1
        context = context | {"run_key": run_key(self.history.lines) or uuid.uuid4().hex}
        context |= provenance(self._run.path, number, deepspeed)
        self.attempt = self._journal.begin_attempt(position.step, position.images, context, number)
        self.history.add(last_line(self._journal.path))
        if changes:
            self.write("config", position, context={"changed": {k: list(v) for k, v in changes.items()}})
        if config.tracking.enabled and self._shipper is None:
            self._shipper = Shipper(destination(self._run, config, self.history.lines))

    def write(self, event: str, position: Position, metrics: dict | None = None, context: dict | None = None) -> None:
        self._position = position
        if self._journal is not None:
            line = self._append(self._journal, event, position, metrics, context)
            if event in KEPT and (found := parse(line)):
                self.history.add(found)
            elif event in ("train", "checkpoint"):
                self.history.reach(self.attempt, position.step)
            if event == "train":
                self._ship()

    def _ship(self) -> None:
        """Begin when there is a curve: importing MLflow takes seconds, in which the first step would have to wait."""
        if self._shipper is not None and not self._shipping:
            self._shipping = True
            self._shipper.start()

    def _watch_node(self, seconds: float) -> None:
        if seconds and self._sampler is None and distributed.local_rank() == 0:
            number = self._rank // distributed.local_world_size()
            node = os.environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID") or str(number)
            self._sampler = SystemSampler(
                self._run.journal_file, self._rank, node, seconds, lambda: (self.attempt, self._position)
            )
            self._sampler.start()

    def write_own(self, event: str, position: Position, context: dict) -> None:
        """What this rank alone knows, in its own journal; the attempt is the one rank 0 began."""
        self._own.attempt = self.attempt
        self._append(self._own, event, position, None, context)

    def _append(self, journal: PatientJournal, event: str, position: Position, metrics, context) -> bytes:
        before = journal.problem
        line = journal.append(event, position.step, position.images, metrics, context)
        if journal.problem is not None and before is None:
            print(f"{journal.path} cannot be written ({journal.problem}); its lines wait in memory", flush=True)
        elif journal.problem is None and before is not None:
            print(f"{journal.path} is written again, with the lines that waited", flush=True)
        return line

    def close(self, finished: bool) -> int:
        """Ship what can be shipped soon; returns the number of journal lines that could not be."""
        if self._sampler is not None:
            self._sampler.close()
        for journal in {self._own, self._journal} - {None}:
            journal.close()
            if journal.unwritten:
                print(
                    f"{journal.unwritten} lines of {journal.path} could not be written: {journal.problem}", flush=True
                )
        if self._shipper is None:
            return 0
        self._ship()
        return self._shipper.close(CLOSE_SECONDS, status="FINISHED" if finished else "KILLED")


def record_evaluation(
    run: RunDirectory,
    position: Position,
    metrics: dict[str, float],
    context: dict[str, Any],
    floor: tuple[dict[str, float], dict[str, Any]] | None = None,
) -> str | None:
    """Write an evaluation of the checkpoint at `position` beside the run's journal, and ship it.

    floor: metrics and context of what the first stage alone is at, where that was measured with it. Returns what to
    tell the user where it could not be shipped.
    """
    journal = evaluation_journal(run.journal_file)
    try:
        if floor is not None:
            journal.append("floor", position.step, position.images, *floor)
        journal.append("eval", position.step, position.images, metrics, context)
    except OSError as e:
        raise UserError(f"cannot write {journal.path}: {e.strerror}; the result is {json.dumps(metrics)}") from None
    journal.close()
    return ship(run)


def ship(run: RunDirectory) -> str | None:
    """Send what is new of a run, unless the training that is under way does it; what to tell the user if that fails."""
    if not run.config().tracking.enabled or holder(run.lock_file) is not None:
        return None
    try:
        sync(run)
    except UserError as e:
        return str(e)
    return None


def ship_comparison(
    members: list[RunDirectory],
    params: dict[str, Any],
    runs: dict[str, tuple[dict[str, float], list[tuple[int, dict[str, float]]]]],
    files: list[Path],
) -> str | None:
    """Send a comparison of runs to where the first of them is tracked; what to tell the user if that fails.

    runs, files: as `send_comparison` takes them. One whose first run is not tracked goes nowhere.
    """
    config = members[0].config()
    if not config.tracking.enabled:
        return None
    keys = [run_key(outline(run.journal_file)) or run.path.name for run in members]
    try:
        send_comparison(
            tracking_uri(members[0], config.tracking), config.tracking.experiment, keys, params, runs, files
        )
    except UserError as e:
        return str(e)
    return None


def sync(run: RunDirectory) -> int:
    """Send the journal lines that MLflow does not have; how many. Raises UserError when MLflow cannot be reached."""
    ended = run.outcome()
    status = None if ended is None else "FINISHED" if ended["outcome"] == "finished" else "KILLED"
    return sync_journal(destination(run, run.config(), outline(run.journal_file)), status=status)


def run_key(lines: list[dict[str, Any]]) -> str | None:
    """What the run's MLflow run is found by: drawn at its first start, in the journal ever since."""
    return next((line["context"].get("run_key") for line in lines if line["event"] == "attempt"), None)


def destination(run: RunDirectory, config: Config, lines: list[dict[str, Any]]) -> Destination:
    """Where this run goes in MLflow, and what its journal's lines say of it there beside its curves."""
    return Destination(
        journal_path=run.journal_file,
        uri=tracking_uri(run, config.tracking),
        experiment=config.tracking.experiment,
        run_name=config.run.name,
        run_key=run_key(lines) or run.path.name,
        params=params(lines, config),
        tags=tags(lines),
        datasets=datasets(lines, config.data),
        reference=reference(config.eval, config.data),
        carbon_intensity=config.tracking.carbon_intensity,
    )
