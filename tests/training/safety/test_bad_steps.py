"""Steps that would harm the run move nothing; where they keep coming the run goes back and around."""

import numpy as np
import pytest

from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.players import batch_losses, build_player, differing, state

SHAPES = [
    *([f"deepspeed.zero_stage={stage}", "train.micro_batch=4"] for stage in (0, 1, 2, 3)),
    *([f"deepspeed.zero_stage={stage}", "deepspeed.precision=bf16_autocast"] for stage in (0, 3)),
    *([f"deepspeed.zero_stage={stage}", "deepspeed.precision=bf16"] for stage in (1, 3)),
    ["deepspeed.zero_stage=2", "deepspeed.offload=optimizer"],
    ["deepspeed.zero_stage=3", "deepspeed.offload=all"],
    ["deepspeed.zero_stage=3", "deepspeed.extra={zero_optimization: {sub_group_size: 2000}}"],
]


def step(engine, config, number, harm=None, limit=None):
    from dtrain import distributed

    for i, losses in enumerate(batch_losses(engine, config, number)):
        loss = losses.mean()
        if harm is not None and distributed.rank() == distributed.world_size() - 1 and i == 0:
            loss = harm(loss, engine)
        engine.backward(loss)
    return engine.step(1e-3, *([] if limit is None else [limit]))


def nan(loss, _):
    return loss * float("nan")


def infinite_loss_of_finite_gradient(loss, _):
    return loss + float("inf")


def refused_steps(config):
    """What bad steps moved, their norms, and how the state then differs from that of an engine that never saw them."""
    engine = build_player(config)
    step(engine, config, 1)
    before = state(engine)
    norms = [step(engine, config, 2, nan), step(engine, config, 3, infinite_loss_of_finite_gradient)]
    norms.append(step(engine, config, 4, limit=1e-9))
    moved = differing(before, state(engine))
    counted = engine.optimizer_steps
    norms.append(step(engine, config, 5))
    plain = build_player(config)
    for number in (1, 5):
        step(plain, config, number)
    return moved, counted, norms, differing(state(plain), state(engine)), len(differing(before, state(engine)))


@pytest.mark.parametrize("overrides", SHAPES, ids=lambda v: "-".join(x.partition("=")[2][:20] for x in v))
def test_a_bad_step_of_one_rank_moves_nothing_on_any_and_training_goes_on_as_if_it_had_not_been(
    digits, tmp_path, overrides
):
    config = tiny(digits, tmp_path, "optim.weight_decay=0.1", *overrides)
    results = run_ranks(refused_steps, 2, config)
    for moved, counted, norms, differs, really in results:
        assert moved == []
        assert counted == 1
        assert not np.isfinite(norms[:2]).any()
        assert np.isfinite(norms[2:]).all()
        assert norms[2] > 1e-9
        assert differs == []
        assert really > 10
    assert results[0][2] == results[1][2]  # the ranks need not ask each other


def test_what_a_checkpoint_holds_of_refused_steps_is_of_its_own_moment(digits, tmp_path):
    from dtrain.training.safety.bad_steps import BadSteps

    config = tiny(digits, tmp_path)
    steps = BadSteps(config.train, config.data.batch_size, None, None)
    steps.judge(float("nan"), 1.0, [(0, 24)])
    state = steps.state()  # written in the background, while more steps are refused
    steps.judge(float("nan"), 1.0, [(24, 48)])
    assert state["refused"] == [[(0, 24)]]
