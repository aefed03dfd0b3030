"""A job for SLURM: one of the templates in slurm/ filled in, refusing what a batch script cannot carry, and `sbatch`.

Values reach bash quoted by shlex and #SBATCH lines in SLURM's own quotes. Imports no torch and no NumPy.
"""

import re
import shlex
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dtrain import plugins
from dtrain.credentials import shown_argument
from dtrain.errors import UserError
from dtrain.run import RunDirectory
from dtrain.training.safety.stopping import DURATION, duration

ROOT = Path(__file__).resolve().parent.parent.parent  # where slurm/, launch/ and eval/ are
NOTICE_SECONDS = 300  # between the signal to stop and the end of a job's time; less of a short job
WORDS = re.compile(r"[\w.,:+@=-]+", re.ASCII)  # what partitions, accounts and qualities of service are made of
FEATURES = re.compile(r"[\w.,:+@=*&|()\[\]-]+", re.ASCII)


class Template(string.Template):
    """%%name, because scripts are full of dollars; a value is not searched for names again."""

    delimiter = "%%"


@dataclass(frozen=True)
class Request:
    """What a job asks SLURM for. time: [D-]HH:MM:SS. Raises UserError for what SLURM would misread."""

    nodes: int
    gpus_per_node: int
    time: str
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    after: str | None = None  # a job that must have ended well before

    def __post_init__(self):
        if not DURATION.fullmatch(self.time) or not duration(self.time):
            raise UserError(f"--time {self.time!r} is not of the form HH:MM:SS or D-HH:MM:SS")
        for name in ("partition", "account", "qos", "constraint"):
            value = getattr(self, name)
            if value is not None and not (FEATURES if name == "constraint" else WORDS).fullmatch(value):
                raise UserError(f"--{name} {value!r} has characters that no {name} has")
        if self.after is not None and not re.fullmatch(r"\d+(_\d+)?", self.after, re.ASCII):
            raise UserError(f"--after {self.after!r} is not the number of a job")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Job:
    """What runs, in which run directory. parts: of a job array, the arguments that each task has for itself."""

    kind: str  # train | evaluate | sweep: its template, and how its logs are called
    run: Path
    command: list[str]
    workers: int = 0  # loader processes a rank
    parts: list[list[str]] | None = None

    def log(self, number: str) -> Path:
        return self.run / "logs" / f"{self.kind}-{number}.log"


def training(config_file: Path, overrides: list[str], run: Path, workers: int) -> Job:
    """run: where it will lie. workers: data.workers."""
    # A path that is absolute is no option and no URL, whatever the file is called.
    command = [str(ROOT / "launch/train.py"), *plugins.arguments(), str(config_file.absolute()), *overrides]
    return Job("train", run.absolute(), command, workers)


def evaluation(run: Path, arguments: list[str]) -> Job:
    command = [str(ROOT / "eval/evaluate.py"), *plugins.arguments(), str(run.absolute()), *_passed(arguments)]
    return Job("evaluate", run.absolute(), command)


def sweep(run: Path, arguments: list[str], parts: list[list[str]]) -> Job:
    command = [str(ROOT / "eval/sweep.py"), *plugins.arguments(), str(run.absolute()), *_passed(arguments)]
    return Job("sweep", run.absolute(), command, parts=parts)


def _passed(arguments: list[str]) -> list[str]:
    """The same, spelled so that deepspeed's own parser does not take `--n` for the beginning of one of its options."""
    return [re.sub(r"^--n(=|$)", "-n", argument) for argument in arguments]


def render(job: Job, request: Request, template: Path | None = None) -> str:
    """The batch script. Raises UserError where the template cannot be read or filled in, or a value not be carried."""
    template = template or ROOT / "slurm" / f"{job.kind}.sbatch"
    log = "%A_%a" if job.parts else "%j"
    output = str(job.log("number")).replace("%", "%%").removesuffix("number.log") + log + ".log"
    values = {
        "name": re.sub(r"[^\w.-]", "_", job.run.name, flags=re.ASCII),
        "nodes": request.nodes,
        "cpus": request.gpus_per_node * (1 + job.workers),
        "gpus": request.gpus_per_node if has_gpus(request.partition) else None,
        "time": request.time,
        "notice": int(min(NOTICE_SECONDS, duration(request.time) / 4)),
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": directive(request.constraint) if request.constraint else None,
        "after": request.after,
        "output": directive(output),
        "folder": bash(str(Path.cwd())),
        "run": bash(str(job.run)),
        "ranks": request.gpus_per_node,
        "command": " ".join(map(bash, job.command)),
        "bin": bash(str(Path(sys.executable).parent)),
    }
    if job.parts:
        values |= {"last": len(job.parts) - 1, "width": len(job.parts[0])}
        values["parts"] = " ".join(bash(argument) for part in job.parts for argument in part)
    try:
        lines = [line for line in template.read_text().splitlines() if not _not_requested(line, values)]
        return Template("\n".join(lines) + "\n").substitute(values)
    except OSError as e:
        raise UserError(f"cannot read the template {template}: {e.strerror}; name one with --template") from None
    except KeyError as e:
        raise UserError(f"{template} has %%{e.args[0]}, which {job.kind} jobs have no value for") from None
    except ValueError as e:
        raise UserError(f"{template}: {e}; a value's place is two percent signs and its name") from None


def _not_requested(line: str, values: dict) -> bool:
    found = re.fullmatch(r"#SBATCH .*%%(\w+)", line)
    return found is not None and values.get(found[1], "") is None


def bash(text: str) -> str:
    """One word of bash that stands for exactly this text."""
    return shlex.quote(_carried(text))


def directive(text: str) -> str:
    """One value of an #SBATCH line, which SLURM reads by rules of its own."""
    if "\\" in _carried(text):
        raise UserError(f"{text!r} has a backslash, which SLURM gives a meaning of its own; rename it")
    return '"' + text.replace('"', '\\"') + '"'


def _carried(text: str) -> str:
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in text):
        raise UserError(f"{text!r} has characters that a batch script cannot carry; leave out control characters")
    return text


def has_gpus(partition: str | None) -> bool:
    """Whether there are nodes that GPUs can be requested of; where no SLURM answers: yes."""
    command = ["sinfo", "--noheader", "--format=%G", *([f"--partition={partition}"] if partition else [])]
    try:
        answer = _ask(command)
    except UserError:
        return True  # a script is only looked at, or sbatch will say what is wrong
    return any(one.startswith("gpu") for line in answer.splitlines() for one in line.split(","))


def submit(job: Job, script: str) -> str:
    """Hand a script to sbatch; the job's number. The script is kept beside the job's log. Raises UserError."""
    run = RunDirectory(job.run)
    run.make_folders()
    try:
        number = _ask(["sbatch", "--parsable"], script).strip().split(";")[0]
    except UserError:
        run.remove_empty_folders()
        raise
    try:
        job.log(number).with_suffix(".sbatch").write_text(_without_secrets(script, job))
    except OSError as e:  # the job is in the queue: its number is what counts
        print(f"the script of job {number} could not be kept: {e.strerror}")
    return number


def _without_secrets(script: str, job: Job) -> str:
    """The script with the secrets of the job's own arguments masked."""
    for word in job.command:
        script = script.replace(bash(word), bash(shown_argument(word)))
    return script


def _ask(command: list[str], text: str | None = None) -> str:
    try:
        answer = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} here: go to a machine of the cluster, or see --dry-run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within a minute; is SLURM's controller up?") from None
    if answer.returncode:
        said = answer.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(f"{command[0]} failed: {said[-1].removeprefix(f'{command[0]}: ')}")
    return answer.stdout
