"""What a rank holds, against the formula in the README: w bytes a weight (4, or 2 in bf16), R ranks, E averages."""

import itertools

import pytest
import torch

from dtrain.cluster.plan import plan
from tests.digits import tiny
from tests.longer import longer, mostly_longer
from tests.ranks import run_ranks
from tests.training.control import controlled


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


def held_on_a_base(config):
    """Bytes of this rank: of the frozen base; of weights, masters, moments and averages of what is trained on it."""
    from dtrain.objectives.build import build as build_objective
    from dtrain.training.players import build as build_players

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    player = build_players(config, build_objective(config), config.data.batch_size // 2).first
    (backbone,) = player.networks.values()
    states = list(player.optimizer.state.values())
    own = player.state.trainable + player.state.frozen
    whole = [p.ds_tensor if player.stage == 3 else p.data for _, p in own]
    return size(backbone.base.parameters()), {
        "weights": size(whole),
        "masters": size(player.state.masters()),
        "moments": size(s[k] for s in states for k in ("exp_avg", "exp_avg_sq")),
        "averages": size(s[k] for s in states for k in s if k.startswith("ema")),
    }


@pytest.mark.parametrize(
    ("kind", "stage"), [("control", 2), longer("control", 3), longer("adapters", 2), ("adapters", 3)]
)
def test_a_rank_on_a_frozen_base_holds_what_the_plan_says(digits, tmp_path, finished_run, kind, stage):
    base, overrides = finished_run.run.path, [f"deepspeed.zero_stage={stage}"]
    if kind == "control":
        config = controlled(digits, tmp_path, base, *overrides)
    else:
        config = tiny(digits, tmp_path, f"model.adapt={{of: {base}, rank: 4}}", *overrides)
    said = plan(config, nodes=1, gpus_per_node=2, gpu_memory=80, mfu=0.4, tflops=None)
    state = next(one.state for one in said.stages if one.stage == stage)
    for of_base, own in run_ranks(held_on_a_base, 2, config):
        assert of_base == said.base
        weights = own.pop("weights")
        assert weights == pytest.approx(state.weights, rel=0.05) if stage == 2 else weights <= state.weights
        assert own == pytest.approx({name: getattr(state, name) for name in own}, rel=0.05)


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
