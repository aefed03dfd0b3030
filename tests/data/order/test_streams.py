"""The number of streams a run is read in stays what it was when the run began, whatever the default becomes."""

import pytest

from dtrain.config import validate
from dtrain.data.shards.manifest import Manifest, Shard
from dtrain.errors import UserError
from dtrain.run import RunDirectory
from dtrain.tracking.journal import Journal
from dtrain.training.identity import reconcile, resolved


@pytest.fixture
def manifest(tmp_path):
    """300,000 samples in one shard, which nobody opens."""
    shard = Shard(name="a.tar", samples=300_000, bytes=1, sha256="0" * 64)
    return Manifest(tmp_path / "m.json", ["jpg"], [shard], None, tmp_path / "m.members")


def configuration(tmp_path, **data):
    tree = {
        "run": {"name": "old", "dir": str(tmp_path)},
        "data": {"shards": str(tmp_path), "image_size": 8, "batch_size": 8} | data,
        "model": {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 2},
        "train": {"steps": 1},
    }
    return validate(tree, "a test")


def test_a_run_of_an_earlier_default_goes_on_in_its_own_streams(tmp_path, manifest):
    run = RunDirectory(tmp_path / "old")
    fresh = configuration(tmp_path)
    assert resolved(run, fresh, manifest).data.streams == 256
    run.make_folders()
    run.save_config(configuration(tmp_path, streams=64))  # as an earlier version resolved it
    assert resolved(run, fresh, manifest).data.streams == 256  # a start that made no step binds nobody
    journal = Journal(run.journal_file)
    journal.begin_attempt(0, 0)
    journal.append("train", 1, 8)
    again = resolved(run, fresh, manifest)
    assert again.data.streams == 64
    assert reconcile(run, again) == {}
    with pytest.raises(UserError, match=r"data\.streams was 64, is 256"):
        reconcile(run, resolved(run, configuration(tmp_path, streams=256), manifest))
