"""A real SLURM of two nodes on this machine, and what tests ask of its jobs."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.afterwards import afterwards

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE")
PATIENCE = 900  # seconds; a launch takes half a minute on a quiet machine, and several on a busy one


def missing() -> str | None:
    """Why no SLURM can be started here."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starting a SLURM takes root"


@contextmanager
def two_nodes():
    """Starts the two nodes and, whatever happens, stops them; SLURM's commands then talk to them."""
    if reason := missing():
        pytest.skip(reason)
    folder = tempfile.mkdtemp(prefix="dtrain-slurm-")
    script = str(ROOT / "slurm" / "two_node_slurm.sh")
    stop = '"$1" stop "$2"; rm -rf "$2"'
    with pytest.MonkeyPatch.context() as patch, afterwards(stop, script, folder):
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        patch.setenv("PYTHONPATH", str(ROOT))
        subprocess.run([script, "start", folder], check=True)
        yield


def submit(*arguments: str) -> "Job":
    command = [sys.executable, "-c", "from dtrain.cli import main; main()", "submit", "--gpus-per-node", "1"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = {line.split()[0]: line for line in done.stdout.splitlines()}
    return Job(said["job"].split()[1].rstrip(":"), Path(said["log:"].removeprefix("log: ")))


class Job:
    def __init__(self, number: str, log: Path):
        self.number, self.log = number, log

    def control(self, *arguments: str) -> str:
        return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True).stdout

    @property
    def facts(self) -> dict[str, str]:
        words = self.control("show", "job", "-o", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    @property
    def requeues(self) -> int:
        return int(self.facts["Restarts"])

    def said(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wait_until(self, condition, what: str, more: float = 0) -> None:
        patience = PATIENCE + more
        end = time.monotonic() + patience
        while not condition():
            lines = "\n".join(self.said()[-40:])
            assert time.monotonic() < end, f"{what}: not within {patience} s; the job is {self.state}\n{lines}"
            time.sleep(0.5)

    def wait_for_requeue(self, count: int, more: float = 0) -> None:
        """more: seconds that may pass on purpose."""
        self.wait_until(lambda: self.ended or self.requeues >= count, f"requeue {count}", more)
        assert self.requeues == count, "\n".join(self.said()[-40:])

    def queued(self) -> str:
        """What waits or runs of it, all tasks of an array."""
        return subprocess.run(["squeue", "-h", "-j", self.number], capture_output=True, text=True).stdout

    @property
    def ended(self) -> bool:
        return self.state in ENDS

    def exit_code(self) -> int:
        """The job's exit code; waits until the job has ended for good."""
        self.wait_until(lambda: self.ended, "the end of the job")
        return int(self.facts["ExitCode"].split(":")[0])

    def kill(self, part_of_command: str, rank: str | None = None) -> None:
        """SIGKILL one process of the job: the first whose command line has this part, of this RANK."""
        for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda p: int(p.name)):
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
            except OSError:
                continue
            mine = environment.get("SLURM_JOB_ID") == self.number and rank in (None, environment.get("RANK"))
            if mine and part_of_command in command:
                os.kill(int(entry.name), signal.SIGKILL)
                return
        raise AssertionError(f"job {self.number} has no process {part_of_command}")
