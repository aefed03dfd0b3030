"""Weights of stage 3 that come and go by blocks: the same steps, bit for bit, with fewer hooks."""

import numpy as np
import pytest
import torch

from dtrain.models.compiled import BLOCKS
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.players import build_player, run_steps, state

UNET = "model={name: unet, width: 8, multipliers: [1, 2], res_blocks: 1, attention: [4], num_classes: 10}"
# No weight is small enough, or asked for again soon enough, to stay.
ALL_GO = "deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 0, stage3_max_reuse_distance: 0}}"


def steps_by(config, blocks: bool):
    """(norms, state, hooks on the modules) of some steps; blocks: as we do it, else as DeepSpeed does by itself."""
    from dtrain.training import zero_blocks

    zero_blocks.BLOCKS = BLOCKS if blocks else ()
    player = build_player(config)
    norms = run_steps(player, config, range(1, 5))
    hooks = sum(len(module._forward_pre_hooks) for module in player.engine.module.modules())
    return norms, {key: value.float().numpy() for key, value in state(player).items()}, hooks


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ("model.depth=3", "train.micro_batch=4", "train.activation_checkpointing=true")),
        pytest.param(1, ("model.depth=3",), marks=pytest.mark.campaign),
        pytest.param(3, ("model.depth=3", "deepspeed.precision=bf16"), marks=pytest.mark.campaign),
        pytest.param(2, (UNET, "deepspeed.precision=bf16_autocast"), marks=pytest.mark.campaign),
    ],
    ids=["recomputed", "one rank", "bf16", "unet"],
)
def test_steps_are_the_same_bit_for_bit_as_with_hooks_on_every_layer(digits, tmp_path, ranks, overrides):
    config = tiny(digits, tmp_path, "deepspeed.zero_stage=3", ALL_GO, *overrides)
    ours, theirs = run_ranks(steps_by, ranks, config, True), run_ranks(steps_by, ranks, config, False)
    for (norms, moved, hooks), (other_norms, other, other_hooks) in zip(ours, theirs, strict=True):
        assert norms == other_norms
        assert all(np.array_equal(moved[key], other[key]) for key in moved | other)
        assert hooks < other_hooks / 2


def turns_by(config, blocks: bool):
    """(norms, states) of steps in which a critic judges two of the backbone's outputs, in its turn and in its own."""
    from dtrain.models.build import allocate
    from dtrain.training import zero_blocks
    from dtrain.training.player import Player
    from dtrain.training.players import Players

    zero_blocks.BLOCKS = BLOCKS if blocks else ()
    main = Player(config, 4, {"backbone": lambda: allocate(config)})
    critic = Player(config, 4, {"critic": lambda: allocate(config)}, name="critic", averaged=False)
    players, norms = Players([main, critic]), []
    for step in range(3):
        x, z = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        t, y = torch.tensor([1, 500, 30, 999]), torch.tensor([3, 0, 9, 10])
        for player in players:
            with players.turn(player.name):
                networks = players.networks_for(player.name)
                fake = networks["backbone"](z, t, y), networks["backbone"](x, t, y)
                if player is critic:
                    judged = networks["critic"](x, t, y) - networks["critic"](fake[0].detach(), t, y)
                else:
                    judged = networks["critic"](fake[0], t, y) + networks["critic"](fake[1], t, y) + fake[1] - x
                player.backward(judged.square().mean())
            norms.append(player.step(1e-3))
    return norms, [{key: value.float().numpy() for key, value in state(player).items()} for player in players]


def test_a_network_called_twice_and_in_another_players_turn_gets_the_gradients_that_it_got(digits, tmp_path):
    config = tiny(digits, tmp_path, "deepspeed.zero_stage=3", ALL_GO, "data.batch_size=8")
    ours, theirs = run_ranks(turns_by, 2, config, True), run_ranks(turns_by, 2, config, False)
    for (norms, states), (other_norms, others) in zip(ours, theirs, strict=True):
        assert norms == other_norms
        for moved, other in zip(states, others, strict=True):
            assert all(np.array_equal(moved[key], other[key]) for key in moved | other)
