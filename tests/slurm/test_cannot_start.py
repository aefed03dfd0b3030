"""A job that cannot start ends within a minute, is not requeued, and its log's last line says why."""

import shutil
import subprocess
import sys
import time

import pytest

from tests.digits import tiny
from tests.slurm.cluster import submit
from tests.small_disk import small_disk

pytestmark = pytest.mark.slurm


@pytest.fixture
def work(slurm, digits, tmp_path, monkeypatch):
    """A folder with a config and its own digits. What was fine when a job was submitted is broken while it waits."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits, tmp_path / "digits")
    (tmp_path / "tiny.yaml").write_text(tiny(tmp_path / "digits", tmp_path / "runs").dump())
    return tmp_path


def slowness() -> float:
    """How many times longer than on a quiet machine importing DeepSpeed takes now, which a start does three times."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import deepspeed"], check=True, capture_output=True)
    return (time.monotonic() - started) / 9


def ends_at_once(spoil, reason: str) -> None:
    """A job is submitted while the nodes are closed, something is spoilt, the nodes are opened."""
    nodes = ["scontrol", "update", "NodeName=n1,n2"]
    subprocess.run([*nodes, "State=DRAIN", "Reason=waiting"], check=True)
    job = submit("tiny.yaml", "--nodes", "2", "--time", "00:10:00")
    spoil()
    subprocess.run([*nodes, "State=RESUME"], check=True)
    job.wait_until(lambda: job.state != "PENDING", "the start")
    started = time.monotonic()
    assert job.exit_code() == 2, "\n".join(job.said()[-40:])
    taken = time.monotonic() - started
    assert taken < 60 or taken < 60 * slowness()
    assert job.requeues == 0
    assert job.said()[-1].startswith("dtrain: ")
    assert reason in job.said()[-1]


def test_a_config_that_became_wrong(work):
    config = work / "tiny.yaml"
    spoil = lambda: config.write_text(config.read_text().replace("depth: 1", "dept: 1"))  # noqa: E731
    ends_at_once(spoil, "unknown key `model.dept`")


def test_a_shard_that_went_away(work):
    shard = sorted((work / "digits/train").glob("*.tar"))[2]
    ends_at_once(shard.unlink, f"cannot find the shard {shard}")


def test_no_space_for_a_checkpoint(work):
    with small_disk(work / "runs/tiny/checkpoints", "size=200k"):
        ends_at_once(lambda: None, "MiB free, and a checkpoint takes")
