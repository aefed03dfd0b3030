"""How runs are doing: what their files say and, where there is a SLURM, its queue. Imports no torch and no NumPy."""

import itertools
import subprocess
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from dtrain.errors import UserError
from dtrain.lock import holder
from dtrain.run import RunDirectory
from dtrain.terminal import printable
from dtrain.tracking.journal import Tail, stride, valid

HEADINGS = ("run", "state", "attempt", "step", "images/s", "loss", "evaluation", "left", "job", "requeues")
NONE = "–"
READ = 1 << 23  # bytes of curves that are read; of longer ones every so many-th line, and the last
LONGEST = 1e10  # seconds that are a time a run could still take
WAITING, STARTED = ("PENDING", "REQUEUED", "REQUEUE_HOLD"), ("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED")
ACTIVE = WAITING + STARTED


@dataclass(frozen=True)
class QueuedJob:
    """A job that SLURM still lists. state: such as PENDING; left: of its time limit, as SLURM writes it."""

    number: str
    state: str
    requeues: str
    left: str


def known_runs(names: list[str]) -> list[RunDirectory]:
    """The runs of these names, or all under runs/; also those that a submitted job has yet to begin.

    Raises UserError for a name that is no run.
    """
    if not names:
        places = sorted(path for path in Path("runs").glob("*") if _is_run(path))
        if not places:
            raise UserError("there are no runs under runs/; name run directories")
        return [RunDirectory(path) for path in places]
    submitted = {name: [p for p in (Path(name), Path("runs") / name) if job_of(p)] for name in names}
    return [RunDirectory(found[0]) if found else RunDirectory.find(name) for name, found in submitted.items()]


def _is_run(path: Path) -> bool:
    try:
        return (path / "config.yaml").exists() or job_of(path) is not None
    except OSError:  # another user's, or on a disk that is away: its line says so
        return True


def job_of(run: Path) -> str | None:
    """The number of the training job submitted last, whose script lies beside its log."""
    try:
        numbers = [path.stem.removeprefix("train-") for path in (run / "logs").glob("train-*.sbatch")]
    except OSError:
        return None
    return max((n for n in numbers if n.isdecimal() and n.isascii()), key=int, default=None)


def queue(numbers: list[str]) -> dict[str, QueuedJob]:
    """What SLURM says of these jobs, by number; nothing of those it no longer lists, or where there is no SLURM."""
    if not numbers:
        return {}
    command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(numbers)}"]
    command += ["--Format=JobID:20,State:20,RestartCnt:20,TimeLeft:20"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    jobs = [QueuedJob(*line.split()) for line in answer.stdout.splitlines() if len(line.split()) == 4]
    return {job.number: job for job in jobs}


def check_free(run: RunDirectory) -> None:
    """Raises UserError where a job or a process has the run, which a second job could only fail on."""
    number = job_of(run.path)
    job = queue([number]).get(number) if number else None
    if job and job.state in ACTIVE:
        raise UserError(
            f"{run.path} has job {number}, {job.state.lower()}; let another one follow with --after {number}"
        )
    if found := holder(run.lock_file):
        raise UserError(f"{run.path} is in use by process {found['pid']} on {found['host']}; wait for it, or stop it")


def table(runs: list[RunDirectory]) -> str:
    """One line a run, also for one that cannot be read."""
    jobs = {run.path: job_of(run.path) for run in runs}
    queued = queue([number for number in jobs.values() if number])
    rows = [HEADINGS, *(row(run, queued.get(jobs[run.path])) for run in runs)]
    rows = [tuple(map(printable, cells)) for cells in rows]
    # A reason is as long as it is, and makes no column wider.
    aligned = [cells if len(cells) == len(HEADINGS) else cells[:1] for cells in rows]
    widths = [max(map(len, column)) for column in itertools.zip_longest(*aligned, fillvalue="")]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows)


def row(run: RunDirectory, job: QueuedJob | None) -> tuple[str, ...]:
    """A run's line, as HEADINGS; of one that cannot be read its name and the reason."""
    try:
        return _row(run, job)
    except PermissionError:
        return (str(run.path), "no access", *[NONE] * (len(HEADINGS) - 2))
    except UserError as e:
        return (str(run.path), f"not readable: {e}")
    except OSError as e:
        return (str(run.path), f"not readable: {e.filename or run.path}: {e.strerror}")


def _row(run: RunDirectory, job: QueuedJob | None) -> tuple[str, ...]:
    journal = Tail(run.journal_file, every=stride(run.journal_file, READ))
    lines = valid(journal.read())
    trained = [line for line in lines if line["event"] == "train"]
    evaluated = [line for line in lines if line["event"] == "eval"]
    attempt = max((line["attempt"] for line in lines), default=0)
    try:
        steps = run.config().train.steps
    except UserError:
        if run.config_file.exists() and not lines:
            raise
        steps = None  # there is none yet, or it is of another version
    step = trained[-1]["step"] if trained else 0
    last = trained[-1]["metrics"] if trained else {}
    left = NONE
    if steps and step < steps and 0 <= (seconds := (steps - step) * last.get("step_seconds", -1)) < LONGEST:
        left = str(timedelta(seconds=round(seconds)))
    evaluation = NONE
    if evaluated and evaluated[-1]["metrics"]:
        name, value = next(iter(evaluated[-1]["metrics"].items()))
        evaluation = f"{name} {value:.4g} at {evaluated[-1]['step']:,}"
    failed = [line["step"] for line in lines if line["event"] == "eval_failed"]
    if failed and failed[-1] > (evaluated[-1]["step"] if evaluated else 0):
        evaluation = f"failed at {failed[-1]:,}"
    return (
        str(run.path),
        state(run, job, bool(lines)) + (f", {journal.left_out} unusable lines" if journal.left_out else ""),
        str(attempt) if attempt else NONE,
        f"{step:,}/{steps:,}" if steps else NONE,
        f"{last['images_per_second']:,.0f}" if "images_per_second" in last else NONE,
        f"{last['loss']:.4f}" if "loss" in last else NONE,
        evaluation,
        left,
        f"{job.number} {job.state.lower()}, {job.left} left" if job else NONE,
        job.requeues if job else NONE,
    )


def state(run: RunDirectory, job: QueuedJob | None, begun: bool) -> str:
    """running, waiting, starting, broke off, not begun, or how the last attempt ended."""
    if holder(run.lock_file):
        return "running"
    if job and job.state in WAITING:
        return "waiting"
    if job and job.state in ("CONFIGURING", "RUNNING"):
        return "starting"
    if outcome := run.outcome():
        return outcome["outcome"].replace("_", " ")
    return "broke off" if begun else "not begun"
