"""Ranks that were given different things: nobody begins, and one line names the rank and the thing."""

import shutil

import pytest

from dtrain.data.pack.pack import pack
from tests.digits import tiny
from tests.ranks import run_ranks


def refused(configs, change=None):
    """Train with the config of this rank; the line that every rank ends in."""
    from dtrain import distributed
    from dtrain.errors import SharedError
    from dtrain.training import run_training as loop
    from dtrain.training.safety import agreement

    rank = distributed.rank()
    if change == "code" and rank == 1:
        agreement.code_digest = lambda: "0123456789ab"
    with pytest.raises(SharedError) as met:
        loop.train(configs[rank])
    return str(met.value)


def lines(*configs, change=None):
    found = run_ranks(refused, 2, configs, change)
    assert found[0] == found[1]
    return found[0]


def test_another_config_manifest_or_weights_on_one_rank_is_named(digits, tmp_path):
    ours = tiny(digits, tmp_path)
    assert "has another `optim.lr` than rank 0" in lines(ours, tiny(digits, tmp_path, "optim.lr=4e-4"))
    assert "has another `train.spike_factor` than" in lines(ours, tiny(digits, tmp_path, "train.spike_factor=0"))

    mixed = [f"{{name: again, shards: {digits}/train, weight: {weight}}}" for weight in (1, 2)]
    line = lines(*(tiny(digits, tmp_path, f"data.mix=[{source}]") for source in mixed))
    assert "has another `data.mix` than rank 0" in line

    pack("sklearn:digits", tmp_path / "other", holdout=360, seed=1)
    other = tiny(digits, tmp_path, f"data.shards={tmp_path}/other/train")
    line = lines(ours, other)
    assert line.startswith("rank 1 on ")
    assert "has another manifest than rank 0 on " in line
    assert "one of 1437 samples with hash" in line

    for name in ("a", "b"):
        (tmp_path / f"{name}.pt").write_bytes(name.encode() * 9)
    both = [tiny(digits, tmp_path, f"run.init_from={tmp_path}/{name}.pt") for name in ("a", "b")]
    assert "has another run.init_from than rank 0" in lines(*both)
    assert "has another code of dtrain than rank 0" in lines(ours, ours, change="code")
    assert not (tmp_path / "tiny").exists()  # nobody began


def test_the_same_data_may_lie_at_another_place_on_another_node(digits, tmp_path):
    shutil.copytree(digits / "train", tmp_path / "elsewhere")
    ours = tiny(digits, tmp_path, "train.steps=1")
    theirs = tiny(digits, tmp_path, "train.steps=1", f"data.shards={tmp_path}/elsewhere")
    run_ranks(begin, 2, [ours, theirs])


def begin(configs):
    from dtrain import distributed
    from dtrain.training import run_training as loop

    assert loop.train(configs[distributed.rank()]) == "finished"
