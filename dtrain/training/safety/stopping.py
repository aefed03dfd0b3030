"""Why a run should stop: a signal, a `stop` file, the job's deadline. All set a flag; the step boundary acts.

A handler does nothing but set the flag, because saving inside one can hang (design, decision 5).

Before the first step there is nothing to save, so Ctrl-C ends the process at once there; from then on it is one of
these signals, and a second one ends at once.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from dtrain.errors import UserError
from dtrain.interrupt import SAME_PRESS_SECONDS, ctrl_c, is_ignored
from dtrain.launcher import slurm_job
from dtrain.terminal import say

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # not SIGUSR1: NCCL may use it
FIRST_CTRL_C = "stopping after this step, with a checkpoint; Ctrl-C again ends at once, without one"
FIRST_UNDER_DEEPSPEED = (
    "stopping after this step, with a checkpoint; DeepSpeed's launcher gives the ranks 30 s for it and "
    "passes on neither a second Ctrl-C nor exit code 75"
)
SECOND_CTRL_C = "ended at once; the run goes on from its newest checkpoint"
POLL_SECONDS = 1.0  # between looks at the stop file, which may lie on a slow file system
LEAST_MARGIN_SECONDS = 10.0


class StopRequest:
    """This rank's wish to stop; ranks agree through the step's reduction. One rank's wish is enough for all.

    deadline: unix seconds by which this process must have saved and ended, or None. on_hangup: called where the
    terminal is gone, which what is printed from then on must not go to.
    """

    def __init__(self, stop_file: Path | None, deadline: float | None, on_hangup: Callable[[], None] = lambda: None):
        self.stop_file, self.deadline = stop_file, deadline
        self.reason: str | None = None
        self._on_hangup = on_hangup
        self._pressed = 0.0
        self._next_look = 0.0
        self._before: dict = {}

    @property
    def why(self) -> str:
        return self.reason or "another rank was asked to"

    def listen(self) -> None:
        """Take over the signals until `restore`; SIGHUP, a closed terminal's, unless nohup has it ignored."""
        for number in (*SIGNALS, signal.SIGHUP):
            if number != signal.SIGHUP or not is_ignored(number):
                self._before[number] = signal.signal(number, self._on_signal)

    def listen_to_ctrl_c(self, agree: Callable[[], None], say: Callable[[str], None]) -> None:
        """From the first step on, until `restore`. A collective: agree() returns once every rank has come so far."""
        if not is_ignored(signal.SIGINT):
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_signal)
        first = FIRST_UNDER_DEEPSPEED if "CROSS_SIZE" in os.environ else FIRST_CTRL_C  # set by that launcher alone
        ctrl_c.by_request(agree, lambda: say(first), SECOND_CTRL_C)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame) -> None:
        self.reason = self.reason or ("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        if number == signal.SIGHUP:
            self._on_hangup()
        # SIGTERM is never a second Ctrl-C: DeepSpeed's launcher sends it after the terminal's SIGINT.
        if number == signal.SIGINT:
            now, self._pressed = time.monotonic(), self._pressed or time.monotonic()
            if now - self._pressed >= SAME_PRESS_SECONDS:
                raise KeyboardInterrupt  # in a program of one's own; in a command, `ctrl_c` has ended it

    def wanted(self, seconds_per_step: float, seconds_per_save: float) -> bool:
        """Whether to stop now; the two durations, as measured, are the deadline's margin."""
        now = time.time()
        if self.reason is None and self.stop_file is not None and now >= self._next_look:
            self._next_look = now + POLL_SECONDS
            if self.stop_file.exists():
                self.reason = f"the file {self.stop_file}"
        if self.reason is None and self.deadline is not None:
            # Twice: a save competes with others for the file system just when a job's time ends.
            margin = LEAST_MARGIN_SECONDS + 2 * seconds_per_save + 3 * seconds_per_step
            if now + margin >= self.deadline:
                self.reason = "the deadline"
        return self.reason is not None


def deadline(configured: str | None, started: float) -> float | None:
    """Unix seconds by which the job ends: `train.deadline`, else SLURM_JOB_END_TIME, else what squeue says; else None.

    configured: a duration from `started` as [D-]HH:MM:SS, or a time in ISO 8601. Raises UserError for anything else.
    """
    if configured:
        return started + duration(configured) if DURATION.fullmatch(configured) else _moment(configured)
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        try:
            return float(end)
        except ValueError:
            raise UserError(f"SLURM_JOB_END_TIME is {end!r}, not a time in Unix seconds; unset it") from None
    job = slurm_job()
    if not job or not shutil.which("squeue"):
        return None
    ask = ["squeue", "-h", "-j", job, "-o", "%e"]
    try:
        end = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as e:
        problem = (getattr(e, "stderr", None) or str(e)).strip()
        say(f"no deadline is known, so the run will not stop by itself: squeue did not answer: {problem}")
        return None
    if end in ("", "N/A", "NONE"):
        return None  # no limit
    try:
        return datetime.fromisoformat(end).timestamp()
    except ValueError:
        print(
            f"no deadline is known, so the run will not stop by itself: of job {job} squeue answered "
            f"{' '.join(end.split())!r}, which is no time; give train.deadline",
            flush=True,
        )
        return None


DURATION = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)")


def duration(text: str) -> float:
    """Seconds of [D-]HH:MM:SS."""
    days, hours, minutes, seconds = (int(part or 0) for part in DURATION.fullmatch(text).groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _moment(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise UserError(
            f"train.deadline {text!r} is neither a duration such as 11:45:00 or 2-00:00:00 nor an ISO 8601 time"
        ) from None
