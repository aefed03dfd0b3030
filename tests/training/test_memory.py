"""What a rank holds, against the formula in the README: w bytes a weight (4, or 2 in bf16), R ranks, E averages."""

import itertools

import pytest
import torch

from tests.digits import tiny
from tests.longer import mostly_longer
from tests.ranks import run_ranks


def held(config):
    """(parameters, bytes by kind) of this rank between the backward pass and the step."""
    from tests.training.players import batch_losses, build_player

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    engine = build_player(config)
    for losses in batch_losses(engine, config, 1):
        engine.backward(losses.mean())
    states = list(engine.optimizer.state.values())
    weights = [p.ds_tensor if engine.stage == 3 else p.data for _, p in engine.state.trainable]
    gradients = [g for group in engine.zero.averaged_gradients.values() for g in group if torch.is_tensor(g)]
    kinds = {
        "weights": size(weights),
        "masters": size(engine.state.masters()),
        "gradients": size(gradients) + size(p.grad for _, p in engine.state.trainable if p.grad is not None),
        "moments": size(s[k] for s in states for k in ("exp_avg", "exp_avg_sq")),
        "averages": size(s[k] for s in states for k in s if k.startswith("ema")),
    }
    return sum(engine.tensor_sizes()[f"{n}:fp32"] for n, _ in engine.state.trainable), kinds


@pytest.mark.parametrize(
    ("stage", "precision"),
    mostly_longer(itertools.product((1, 2, 3), ("fp32", "bf16")), [(1, "fp32"), (2, "fp32"), (3, "bf16")]),
)
def test_a_rank_holds_what_the_formula_says_within_5_percent(digits, tmp_path, stage, precision):
    w, averages = {"fp32": 4, "bf16": 2}[precision], 2
    for ranks in (1, 2, 3):
        overrides = [f"deepspeed.zero_stage={stage}", f"deepspeed.precision={precision}", "model.width=96"]
        config = tiny(digits, tmp_path, *overrides, "ema=[{decay: 0.9}, {decay: 0.99}]")
        for parameters, kinds in run_ranks(held, ranks, config):
            share = parameters / ranks
            expected = {
                "weights": w * (share if stage == 3 else parameters),
                "masters": 4 * share,
                "gradients": w * share,
                "moments": 8 * share,
                "averages": 4 * share * averages,
            }
            assert kinds == pytest.approx(expected, rel=0.05), ranks
