"""An autoencoder of digits with a critic, and one with a perceptual distance, small enough for a second or two."""

import pytest

from dtrain.tracking.journal import read
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.runs import train

MODEL = "model={name: kl_autoencoder, width: 8, multipliers: [1, 2], res_blocks: 1, latent_channels: 2}"
CRITIC = "{from_step: 2, weight: 0.8, width: 8, layers: 1, lr: 3.0e-4, betas: [0.5, 0.9]}"


def with_critic(digits, folder, *overrides, **keys):
    more = "".join(f", {key}: {value}" for key, value in {"critic": CRITIC, "kl_weight": 0.01, **keys}.items())
    return tiny(digits, folder, MODEL, f"objective={{kind: autoencoding{more}}}", *overrides)


def metrics(config):
    """Of each step, in the journal's valid lines."""
    return [line["metrics"] for line in read(config.run.path / "journal.jsonl") if line["event"] == "train"]


def series(digits, folder, steps, stage, ranks, micro):
    """Both losses and the critic's weight of each step, as far as it has them."""
    how = f"deepspeed.zero_stage={stage}", f"train.micro_batch={micro}", f"train.steps={steps}"
    config = with_critic(digits, folder, *how)
    run_ranks(train, ranks, config)
    return [
        [line[name] for name in ("loss", "loss_critic", "critic_ratio") if name in line] for line in metrics(config)
    ]


def assert_same(ours, reference):
    """Losses within 1e-5. The weight, a ratio of two norms, within a thousandth of itself."""
    for line, expected in zip(ours, reference, strict=True):
        assert line[:2] == pytest.approx(expected[:2], abs=1e-5)
        assert line[2:] == pytest.approx(expected[2:], rel=1e-3)
