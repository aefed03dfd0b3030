"""When the journal is shipped: all the while, by a thread that nobody waits for; or now, by `sync`."""

import logging
import threading
import time
from pathlib import Path
from typing import Any

from dtrain.credentials import without_credentials
from dtrain.errors import UserError
from dtrain.tracking.journal import Tails, outline, valid
from dtrain.tracking.mlflow.address import reason
from dtrain.tracking.mlflow.description import Landmarks
from dtrain.tracking.mlflow.link import keep_problem
from dtrain.tracking.mlflow.run import METRICS_PER_BATCH, Destination, Run, has_news

POLL_SECONDS = 2.0
LONGEST_BACK_OFF_SECONDS = 60.0
MOST_LINES = 10_000  # that wait in memory; what is behind them waits in the files


class Pending:
    """The valid lines of a run's journals that hold something for MLflow and are not yet known to be there.

    lines: the first of them, about MOST_LINES at most, however long MLflow does not answer.
    """

    def __init__(self, to: Destination):
        self._path = to.journal_path
        self._tails = Tails(to.journal_path)
        self._begun: list[dict[str, Any]] | None = None  # the attempts so far, by which lines are void
        self._lock = threading.Lock()
        self.landmarks = Landmarks()
        self.lines: list[dict[str, Any]] = []

    @property
    def started(self) -> float:
        return self._tails.first or time.time()

    @property
    def ended(self) -> float:
        return self._tails.last or time.time()

    def poll(self) -> bool:
        """Read on, as far as there is room; whether something is pending."""
        with self._lock:
            while len(self.lines) < MOST_LINES and self._read():
                pass
            return bool(self.lines)

    def _read(self) -> bool:
        """The next part of the journals; False where there is none yet."""
        if self._begun is None:  # a line may be void by an attempt that a later part tells of
            self._begun = [line for line in outline(self._path) if line["event"] == "attempt"]
        if not (new := self._tails.read(MOST_LINES)):
            return False
        self.lines = [line for line in valid(self.lines + new, self._begun) if has_news(line)]
        known = {line["attempt"] for line in self._begun}
        self._begun += [line for line in new if line["event"] == "attempt" and line["attempt"] not in known]
        self.landmarks.add(self._tails.own, self._begun)
        return True

    def drain(self, run: Run, deadline: float = float("inf")) -> None:
        """Send what was polled and, where more waited in the files, that too; not what is written meanwhile.

        A training that writes faster than MLflow answers would else keep one round going for ever.
        """
        behind = True
        while behind:
            behind = len(self.lines) >= MOST_LINES
            while self.lines and time.monotonic() < deadline:
                with self._lock:
                    lines = self.lines[:METRICS_PER_BATCH]
                sent = run.send(lines)
                with self._lock:
                    del self.lines[:sent]
            behind = behind and not self.lines and self.poll()

    def count(self) -> int:
        """How many are pending, in memory and behind it; nothing can be sent any more then."""
        with self._lock:
            count = len(self.lines)
            self.lines = []
            while self._read():
                count, self.lines = count + len(self.lines), []
            return count


class Shipper:
    """A daemon thread that keeps MLflow up to date with the journal, from `start` to `close`.

    `run_id` is None until MLflow has answered. `error` is the reason of the last failure, free of credentials; None
    when all goes well.
    """

    def __init__(self, to: Destination):
        self._to, self._run = to, Run(to)
        self._pending = Pending(to)
        self._sent_to: str | None = None  # the MLflow run that has what is no longer pending
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
        if left := self._pending.count():
            keep_problem(Path(self._to.journal_path).parent, self._to.uri, self.error or "no answer in time")
        return left

    def _work(self) -> None:
        back_off = 1.0
        connected = False
        while True:
            closing = self._closing.is_set()  # asked before reading, so that no line written before close is missed
            try:
                self._pending.poll()
                if not connected:
                    self._run.connect(self._pending.started)
                    if self._sent_to not in (None, self._run.id):
                        self._begin_again()
                    self._sent_to = self._run.id
                    self._run.set_running()
                    connected = True
                self._pending.drain(self._run, self._deadline)
                self._run.describe(self._pending.landmarks)
                if closing and not self._pending.lines:
                    self._run.finish(self._status, self._pending.ended, self._pending.landmarks)
                    self.error = None
                    return
                self.error, back_off, pause = None, 1.0, POLL_SECONDS
            except Exception as e:  # whatever went wrong out there, the journal has it all: say so, and try again
                if isinstance(e, UserError) and self.error != str(e):
                    logging.getLogger(__name__).warning("nothing is sent to MLflow for now: %s", e)
                self.error = reason(e)
                connected = False
                pause, back_off = back_off, min(2 * back_off, LONGEST_BACK_OFF_SECONDS)
            if not closing:
                self._closing.wait(pause)
            elif time.monotonic() >= self._deadline:
                return
            else:
                time.sleep(min(1.0, pause, max(0.0, self._deadline - time.monotonic())))

    def _begin_again(self) -> None:
        """All of the journal is to be sent: the run it went to has been deleted."""
        logging.getLogger(__name__).warning("the run was deleted in MLflow: all of it is sent again, to a new one")
        self._pending = Pending(self._to)
        self._pending.poll()


def sync(to: Destination, status: str | None = None) -> int:
    """Ship now, in the foreground, what MLflow does not have yet; the number of journal lines that were new to it.

    `status` (FINISHED, FAILED, KILLED) marks the run's end, where it has ended. Raises UserError when MLflow does not
    take them.
    """
    run, pending = Run(to), Pending(to)
    pending.poll()

    def ship() -> None:
        run.connect(pending.started)
        pending.drain(run)
        run.finish(status, pending.ended, pending.landmarks)

    try:
        try:
            ship()
        except Exception as e:
            if "IntegrityError" not in str(e):
                raise
            ship()  # another task of the sweep wrote the same tag in the same moment, and now it is there
    except Exception as e:
        left = pending.count()
        do = "" if isinstance(e, UserError) else "; start the server or correct tracking.uri, then run sync again"
        raise UserError(
            f"cannot ship {to.journal_path} to MLflow at {without_credentials(to.uri)} ({left} lines left): "
            f"{reason(e)}{do}"
        ) from e
    return run.lines_shipped
