"""Networks told in words: {DiT, MMDiT, UNet} × {stage 0, 1, 2, 3} × {1, 2 ranks}, 50 steps with two evaluations;
micro-batches, compiled blocks, and runs that are killed and go on."""

import itertools

import numpy as np
import pytest

from dtrain.tracking.journal import read
from tests.digits import losses
from tests.ranks import run_ranks
from tests.training.networks import NETWORKS, pack_pairs, told_in_words
from tests.training.runs import train, trained

pytestmark = pytest.mark.campaign
STEPS = 50
HOW = (f"train.steps={STEPS}", "train.checkpoint_every=10", "eval.every=25", "eval.guidance=2", "eval.steps=2")
SHAPES = list(itertools.product(NETWORKS, (0, 1, 2, 3), (1, 2)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return pack_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def reference(pairs, tmp_path_factory):
    """Network → its run at the default stage on one rank."""
    configs = {name: told_in_words(pairs, tmp_path_factory.mktemp(name), name, *HOW) for name in NETWORKS}
    for config in configs.values():
        trained(config, 1)
    return configs


def distances(config):
    return [line["metrics"]["fd_pixels"] for line in read(config.run.path / "journal.jsonl") if line["event"] == "eval"]


@pytest.mark.parametrize(("network", "stage", "ranks"), SHAPES)
def test_losses_and_distances_are_the_same_in_every_shape(pairs, tmp_path, reference, network, stage, ranks):
    config = told_in_words(pairs, tmp_path, network, *HOW, f"deepspeed.zero_stage={stage}")
    assert trained(config, ranks) == pytest.approx(losses(reference[network]), abs=1e-5)
    assert len(distances(config)) == 2
    assert np.allclose(distances(config), distances(reference[network]), rtol=1e-3)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("how", ["train.micro_batch=4", "train.compile=blocks", "train.activation_checkpointing=true"])
def test_losses_are_the_same_in_micro_batches_compiled_and_recomputed(pairs, tmp_path, reference, network, how):
    config = told_in_words(pairs, tmp_path, network, *HOW, how, "deepspeed.zero_stage=2")
    run_ranks(train, 2, config, timeout=600)  # compiling takes its time
    assert losses(config) == pytest.approx(losses(reference[network]), abs=1e-5)


@pytest.mark.parametrize(("network", "stage", "ranks"), SHAPES)
def test_a_killed_run_goes_on_bit_for_bit(pairs, tmp_path, network, stage, ranks):
    how = f"deepspeed.zero_stage={stage}", "train.steps=20", "train.checkpoint_every=5"
    whole, killed = (told_in_words(pairs, tmp_path / name, network, *how) for name in ("whole", "killed"))
    trained(whole, ranks)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train, ranks, killed, environment={"DTRAIN_FAULTS": "sigkill at=step step=13"})
    assert trained(killed, ranks) == losses(whole)
