"""A player under real DeepSpeed on real ranks."""

import itertools

import numpy as np
import pytest
import torch

from dtrain.errors import UserError
from tests.digits import tiny
from tests.longer import mostly_longer
from tests.ranks import run_ranks
from tests.training.players import batch_losses, build_player, pieces_of, run_steps

AVERAGES = "ema=[{decay: 0.9}, {decay: 0.5}, {sigma_rel: 0.1}]"


def gathered(engine, config, key):
    from dtrain.models.build import build as build_model

    module = engine.gather(key, build_model(config))
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def average_by_hand(config):
    """(averages that differ from those made from gathered weights after each step taken, how far they are from them).

    A step that is refused counts for none of them.
    """
    engine = build_player(config)
    by_hand = [gathered(engine, config, "fp32") for _ in config.ema]
    taken = 0
    for step in range(1, 7):
        run_steps(engine, config, [step], **({"limit": 0.0} if step == 3 else {}))
        if step == 3:
            continue
        taken += 1
        weights = gathered(engine, config, "fp32")
        # The power function's as in Karras et al. 2024, γ 6.937 for a width of a tenth.
        others = [0.1, 0.5, 1 - (1 - 1 / taken) ** 7.937203937601809]
        for other, average in zip(others, by_hand, strict=True):
            for name, value in average.items():
                value.lerp_(weights[name], other)
    kept = [gathered(engine, config, f"ema_{i}") for i in range(len(config.ema))]
    moved = max((weights[n] - kept[0][n]).abs().max().item() for n in weights)
    different = [n for i in range(3) for n, v in by_hand[i].items() if not torch.equal(v, kept[i][n])]
    return different, moved


@pytest.mark.parametrize(
    ("stage", "world_size"), mostly_longer(itertools.product(range(4), (1, 2)), [(0, 1), (1, 2), (2, 2), (3, 2)])
)
def test_the_ema_equals_one_kept_by_hand_from_gathered_weights_bit_for_bit(digits, tmp_path, stage, world_size):
    config = tiny(digits, tmp_path, f"deepspeed.zero_stage={stage}", AVERAGES)
    for different, moved in run_ranks(average_by_hand, world_size, config):
        assert different == []
        assert moved > 1e-4


def assembled(config, world_size):
    """Global tensors put together from all ranks' pieces, and how often each element was given."""
    results = run_ranks(pieces_of, world_size, config, 3)
    sizes = results[0][1]
    tensors = {n: np.zeros(s, np.float32) for n, s in sizes.items()}
    given = {n: np.zeros(s, int) for n, s in sizes.items()}
    for pieces, _, _ in results:
        for name, start, values in pieces:
            tensors[name][start : start + len(values)] = values
            given[name][start : start + len(values)] += 1
    return tensors, given, results[0][2]


def test_pieces_of_all_ranks_are_the_whole_state_once_and_equal_at_every_stage_and_world_size(digits, tmp_path):
    reference, _, norms = assembled(tiny(digits, tmp_path, "deepspeed.zero_stage=0"), 1)
    assert {n.split(":")[1] for n in reference} == {"fp32", "exp_avg", "exp_avg_sq", "ema_0"}
    for stage in (0, 1, 2, 3):
        for world_size in (1, 3):
            tensors, given, other = assembled(tiny(digits, tmp_path, f"deepspeed.zero_stage={stage}"), world_size)
            assert all((count == 1).all() for count in given.values()), (stage, world_size)
            np.testing.assert_allclose(other, norms, rtol=1e-5)
            for name, values in reference.items():
                # Adam divides by the root of tiny second moments, so rounding shows up to lr = 1e-3 times 1e-2.
                np.testing.assert_allclose(tensors[name], values, rtol=1e-4, atol=1e-5, err_msg=f"{name} {stage}")


def plain_pytorch(config, steps):
    """The same steps without DeepSpeed."""
    from dtrain.models.build import build as build_model

    model = build_model(config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=1e-3,
        betas=config.optim.betas,
        weight_decay=config.optim.weight_decay,
        fused=config.optim.fused or None,
    )
    model.micro_batch = config.data.batch_size
    norms = []
    for step in range(1, steps + 1):
        (losses,) = batch_losses(model, config, step)
        optimizer.zero_grad()
        losses.mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, config.optim.gradient_clip)))
        optimizer.step()
    return {n: p.detach().numpy().ravel() for n, p in model.named_parameters()}, norms


@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_steps_equal_plain_pytorch_with_clipping_weight_decay_and_accumulation(digits, tmp_path, clip):
    overrides = [f"optim.gradient_clip={clip}", "optim.weight_decay=0.1"]
    expected, norms = run_ranks(plain_pytorch, 1, tiny(digits, tmp_path, *overrides), 3)[0]
    for stage in (0, 2):
        config = tiny(digits, tmp_path, *overrides, f"deepspeed.zero_stage={stage}", "train.micro_batch=4")
        tensors, _, measured = assembled(config, 2)
        np.testing.assert_allclose(measured, norms, rtol=1e-5)
        for name, values in expected.items():
            np.testing.assert_allclose(tensors[f"{name}:fp32"], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_fused_and_other_steps_are_pytorchs_own_of_the_same_kind_bit_for_bit(digits, tmp_path):
    """They differ from each other in the last bits, so that a run keeps the kind that it began with."""
    found = {}
    for fused in (True, False):
        config = tiny(digits, tmp_path, "deepspeed.zero_stage=0", "optim.weight_decay=0.1", f"optim.fused={fused}")
        expected, _ = run_ranks(plain_pytorch, 1, config, 3)[0]
        found[fused], _, _ = assembled(config, 1)
        assert [name for name in expected if not np.array_equal(found[fused][f"{name}:fp32"], expected[name])] == []
    differing = [name for name in found[True] if not np.array_equal(found[True][name], found[False][name])]
    assert differing
    for name in found[True]:
        np.testing.assert_allclose(found[True][name], found[False][name], rtol=1e-5, atol=1e-7, err_msg=name)


def kind_of_optimizer(config):
    player = build_player(config)
    return player.optimizer.defaults["fused"], {str(state["step"].device) for state in player.optimizer.state.values()}


def test_a_run_begun_before_fused_updates_goes_on_without_them(digits, tmp_path):
    from dtrain.config import Config, with_earlier_values

    config = tiny(digits, tmp_path)
    assert run_ranks(kind_of_optimizer, 1, config)[0] == (True, {"cpu"})
    tree = config.model_dump(mode="json")
    del tree["optim"]["fused"]
    assert run_ranks(kind_of_optimizer, 1, Config(**with_earlier_values(tree)))[0] == (None, {"cpu"})


def test_without_clipping_the_norm_is_still_measured(digits, tmp_path):
    clipped = run_ranks(pieces_of, 1, tiny(digits, tmp_path, "optim.gradient_clip=1e9"), 2)[0]
    free = run_ranks(pieces_of, 1, tiny(digits, tmp_path, "optim.gradient_clip=0"), 2)[0]
    assert clipped[2] == free[2]
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(clipped[0], free[0], strict=True))


def test_a_batch_that_does_not_divide_names_the_nearest_that_does():
    from dtrain.training.division import rows_per_rank

    assert rows_per_rank(128, None, 4) == (32, 32)
    with pytest.raises(UserError, match=r"128 does not divide by 3 ranks; the nearest that does is 129"):
        rows_per_rank(128, None, 3)
    with pytest.raises(UserError, match=r"128 does not divide by 200 ranks; the nearest that does is 200"):
        rows_per_rank(128, None, 200)
    with pytest.raises(UserError, match=r"micro_batch 5 does not divide the 32 rows .* the nearest that does is 4"):
        rows_per_rank(128, 5, 4)


def test_raw_deepspeed_options_are_merged_last(digits, tmp_path):
    from dtrain.training.options import deepspeed_options

    config = tiny(digits, tmp_path, "deepspeed.extra={zero_optimization: {overlap_comm: true}, steps_per_print: 5}")
    options = deepspeed_options(config, 1, 24, 1000)
    assert options["zero_optimization"]["overlap_comm"] is True
    assert options["zero_optimization"]["stage"] == 2
    assert options["steps_per_print"] == 5
