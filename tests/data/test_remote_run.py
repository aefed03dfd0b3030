"""A run whose shards and held-out split lie behind URLs is the run from the disk, and journals how its cache did."""

import shutil

import pytest

from dtrain import distributed
from dtrain.data.shards.cache import default_directory
from dtrain.errors import SharedError, UserError
from dtrain.evaluation.reference import Reference
from dtrain.tracking.journal import read
from dtrain.training.check import check_start
from tests.data.servers import serve
from tests.digits import losses, tiny
from tests.ranks import run_ranks
from tests.training.runs import train

EVALUATED = ("train.steps=8", "eval.every=8", "eval.features=pixels", "eval.metrics=[fd]")


def evaluated(config) -> list[dict]:
    lines = [line for line in read(config.run.path / "journal.jsonl") if line["event"] == "eval"]
    assert len(lines) == 1
    return [{name: value for name, value in lines[0]["metrics"].items() if name.startswith(("fd_", "nll", "val"))}]


def test_training_and_evaluating_over_http_give_the_losses_and_distances_of_the_disk(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    local = tiny(digits, tmp_path / "local", *EVALUATED)
    run_ranks(train, 2, local)
    for split in ("train", "holdout"):
        shutil.copytree(digits / split, tmp_path / split, ignore=shutil.ignore_patterns("*.tar", "*.npz"))
    with serve(digits) as (url, behaviour):
        remote = tiny(
            digits,
            tmp_path / "remote",
            *EVALUATED,
            f"data.shards={url}/train",
            f"data.manifest={tmp_path}/train/manifest.json",
            f"data.holdout={tmp_path}/holdout/manifest.json",
            f"data.holdout_shards={url}/holdout",
            f"data.cache_dir={tmp_path}/cache",
        )
        assert "starts: 8 steps" in check_start(remote, 2)
        assert behaviour.requests == []  # what is remote is met when it is read
        run_ranks(train, 2, remote)
        asked = {path.split("/")[1] for path, _ in behaviour.requests}
    assert asked == {"train", "holdout"}
    assert losses(remote) == losses(local)
    assert evaluated(remote) == evaluated(local)
    assert not default_directory().exists()  # all went through data.cache_dir
    steps = [e["metrics"] for e in read(remote.run.path / "journal.jsonl") if e["event"] == "train"]
    rates = [m["cache_hit_rate"] for m in steps if "cache_hit_rate" in m]
    assert len(rates) == len(steps)
    assert 0 <= rates[0] < 1
    assert rates[-1] == 1  # shards of one block each, that both ranks share
    assert sum(m["bytes_read"] for m in steps) <= 2 * sum(f.stat().st_size for f in (digits / "train").glob("*.tar"))


def test_a_held_out_split_is_named_by_a_local_manifest(digits, tmp_path):
    with pytest.raises(UserError, match=r"name a local manifest, its shards in holdout_shards"):
        tiny(digits, tmp_path, "data.holdout=https://somewhere/manifest.json")
    with pytest.raises(UserError, match=r"would run a command; say allow_pipe: true"):
        tiny(digits, tmp_path, "data.holdout_shards='pipe:'")
    with pytest.raises(UserError, match=r"holdout_shards needs holdout"):
        tiny(digits, tmp_path, "data.holdout=null", "data.holdout_shards=/elsewhere")


def refused(configs) -> str:
    """What this rank raises, each rank with a config of its own, as a cache is of its own machine."""
    with pytest.raises(SharedError) as raised:
        Reference.open(configs[distributed.rank()], "cpu")
    return str(raised.value)


def test_a_cache_that_one_machine_alone_refuses_ends_the_reference_on_all_ranks(digits, tmp_path):
    (tmp_path / "file").write_text("where no folder can be")
    configs = [
        tiny(digits, tmp_path, "data.holdout_shards=http://127.0.0.1:9/holdout", f"data.cache_dir={tmp_path}/{cache}")
        for cache in ("cache", "file/cache")
    ]
    found = run_ranks(refused, 2, configs, timeout=30)
    assert found == [f"cannot make data.cache_dir {tmp_path}/file/cache: Not a directory; name another"] * 2
