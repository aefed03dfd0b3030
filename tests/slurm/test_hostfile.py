"""A hostfile and pdsh, on two hosts that are network namespaces with a cable between them: real addresses, real TCP.

Only the remote shell is a stand-in: `ssh` enters the namespace, with the bare environment that a real one gives.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.tracking.journal import events
from tests.afterwards import afterwards
from tests.digits import losses, tiny
from tests.ranks import run_ranks
from tests.slurm.cluster import ROOT
from tests.training.runs import train

pytestmark = pytest.mark.slurm
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do case $1 in -o | -l | -p) shift 2 ;; *) shift ;; esac; done
host=$1
shift
exec env -i HOME="$HOME" PATH=/usr/sbin:/usr/bin:/sbin:/bin ip netns exec "dtrain-$host" bash -c "$*"
"""


@pytest.fixture
def hosts(tmp_path):
    """worker-1 at 10.77.0.1 and worker-2 at 10.77.0.2; the folder of their `ssh`."""
    if os.geteuid() != 0 or not shutil.which("pdsh") or not shutil.which("ip"):
        pytest.skip("two network namespaces take root, iproute2 and pdsh")
    names = ["worker-1", "worker-2"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    with afterwards("ip netns del dtrain-worker-1; ip netns del dtrain-worker-2"):
        for name in names:
            ip("netns", "add", f"dtrain-{name}")
        ends = [word for name in names for word in ("name", "cable0", "netns", f"dtrain-{name}")]
        ip("link", "add", *ends[:4], "type", "veth", "peer", *ends[4:])
        for number, name in enumerate(names, 1):
            inside = ("-n", f"dtrain-{name}")
            ip(*inside, "address", "add", f"10.77.0.{number}/24", "dev", "cable0")
            ip(*inside, "link", "set", "cable0", "up")
            ip(*inside, "link", "set", "lo", "up")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/ssh").write_text(SSH)
        (tmp_path / "bin/ssh").chmod(0o755)
        yield tmp_path / "bin"


def test_a_hostfile_starts_a_training_on_two_hosts(hosts, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny(digits, tmp_path / "runs")
    Path("tiny.yaml").write_text(config.dump())
    Path("hostfile").write_text((ROOT / "launch/hostfile.example").read_text().replace("slots=8", "slots=1"))
    Path(".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=cable0\n")
    environment = os.environ | {"PATH": f"{hosts}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    command = [Path(sys.executable).parent / "deepspeed", "--hostfile", "hostfile", ROOT / "launch/train.py"]
    done = subprocess.run(
        [*command, "tiny.yaml", "tracking.experiment=two words"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--master_addr=10.77.0.1" in done.stdout + done.stderr
    (attempt,) = [e for e in events(config.run.path / "journal.jsonl") if e["event"] == "attempt"]
    assert attempt["context"]["world_size"] == 2
    whole = tiny(digits, tmp_path / "whole")
    run_ranks(train, 2, whole)
    assert losses(config) == pytest.approx(losses(whole), rel=1e-5)
