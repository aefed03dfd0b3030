"""A SLURM that was started for tests is gone after them, also when the tests were killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import PATIENCE, ROOT, missing

pytestmark = pytest.mark.slurm
SESSION = """
import os, subprocess, time
from tests.slurm.cluster import two_nodes
with two_nodes():
    subprocess.run(["sbatch", "--nodes=2", "--wrap=srun sleep 1234", "--output=/dev/null"], check=True)
    while "RUNNING" not in subprocess.run(["squeue", "--format=%T"], capture_output=True, text=True).stdout:
        time.sleep(0.2)
    print(os.environ["SLURM_CONF"], flush=True)
    time.sleep(1234)
"""


def processes(of: str) -> list[str]:
    """Command lines of the living processes that have this in theirs or in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            if command and of.encode() in command + (entry / "environ").read_bytes():
                found.append(command.replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_a_killed_session_leaves_no_daemon_no_job_and_no_folder():
    if reason := missing():
        pytest.skip(reason)
    command = [sys.executable, "-c", SESSION]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    session = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    said = [session.stdout.readline() for _ in range(2)]  # sbatch's, then the place
    session.kill()
    session.wait()
    folder = Path(said[1].strip()).parent
    assert folder.name.startswith("dtrain-slurm-"), said
    end = time.monotonic() + PATIENCE
    while folder.exists() or processes(str(folder)):
        assert time.monotonic() < end, (list(folder.glob("*")), processes(str(folder)))
        time.sleep(0.5)
