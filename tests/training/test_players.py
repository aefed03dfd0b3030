"""Two optimizers in one step, and two networks under one, against plain PyTorch in a single process."""

import itertools

import numpy as np
import pytest
import torch

from dtrain.errors import UserError
from tests.longer import mostly_longer
from tests.ranks import run_ranks
from tests.training.toys import (
    ADVERSARIAL,
    ALLOCATE,
    JOINT,
    KINDS,
    STEPS,
    assert_close,
    by_plain_pytorch,
    config_of,
    copies,
    players_of,
    take,
    train,
    whole,
)

SHAPES = list(itertools.product(KINDS, (0, 1, 2, 3), (1, 2)))
OFTEN = [("adversarial", 0, 2), ("adversarial", 3, 2), ("joint", 2, 2)]


@pytest.fixture(scope="module")
def expected(digits, tmp_path_factory):
    return by_plain_pytorch(digits, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(("kind", "stage", "ranks"), mostly_longer(SHAPES, OFTEN))
def test_ten_steps_equal_plain_pytorch(digits, tmp_path, expected, kind, stage, ranks):
    config = config_of(digits, tmp_path, stage)
    assert_close(run_ranks(train, ranks, KINDS[kind], config, range(STEPS)), expected[kind])


WAYS = list(itertools.product(KINDS, *[list(itertools.product((0, 1, 2, 3), (1, 2)))] * 2))


@pytest.mark.parametrize(
    ("kind", "written", "read"),
    mostly_longer(WAYS, [("adversarial", (2, 2), (3, 1)), ("joint", (3, 1), (2, 2))]),
)
def test_a_checkpoint_of_one_shape_goes_on_in_another(digits, tmp_path, expected, kind, written, read):
    toys, half, folder = KINDS[kind], STEPS // 2, tmp_path / "checkpoints"
    folder.mkdir()
    before = run_ranks(train, written[1], toys, config_of(digits, tmp_path, written[0]), range(half), None, folder)
    config, path = config_of(digits, tmp_path, read[0]), folder / f"step-{half:08d}"
    results = run_ranks(train, read[1], toys, config, range(half, STEPS), path)
    saved, loaded = whole([pieces for pieces, _, _ in before]), whole([loaded for _, _, loaded in results])
    assert saved.keys() == loaded.keys()
    assert all(np.array_equal(saved[name], loaded[name]) for name in saved)
    assert_close(results, expected[kind])


def train_with_critic_at_2(config):
    return train(ADVERSARIAL, config, range(STEPS), zero_stage=2)


def test_a_critic_at_a_stage_of_its_own_trains_as_at_any(digits, tmp_path, expected):
    assert_close(run_ranks(train_with_critic_at_2, 2, config_of(digits, tmp_path, 3)), expected["adversarial"])


def refused(config):
    """(what of each player moved in a step whose second turn was refused, the step counts, moved in the next step)."""
    players = players_of(ADVERSARIAL, config)
    take(ADVERSARIAL, players, config, 0)
    before = [copies(player, whole=True) for player in players]
    take(ADVERSARIAL, players, config, 1, refuse="critic")
    between = [copies(player, whole=True) for player in players]
    counts = [player.optimizer_steps for player in players]
    take(ADVERSARIAL, players, config, 2)
    after = [copies(player, whole=True) for player in players]
    return differing(before, between), counts, differing(between, after)


def differing(before, after) -> list[tuple[int, int]]:
    """(pieces that differ, pieces) of each player."""
    return [
        (sum(not np.array_equal(old[name], new[name]) for name in old), len(old))
        for old, new in zip(before, after, strict=True)
    ]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_refused_turn_leaves_its_player_bit_for_bit_and_those_before_it_moved(digits, tmp_path, stage):
    for moved, counts, then in run_ranks(refused, 2, config_of(digits, tmp_path, stage)):
        assert moved[0][0] == moved[0][1] > 0
        assert moved[1][0] == 0 < moved[1][1]
        assert counts == [2, 1]
        assert all(some == of for some, of in then)


def frozen(config):
    players = players_of(ADVERSARIAL, config)
    x = torch.randn(4, 16, requires_grad=True)
    critic = players["critic"]
    with players.turn("main"):
        inside = [p.requires_grad for _, p in critic.state.trainable]
        players.networks_for("main")["critic"](x, torch.rand(4)).sum().backward()
    left = [p.grad is not None for _, p in critic.state.trainable]
    return inside, left, [p.requires_grad for _, p in critic.state.trainable], x.grad.abs().sum().item()


def test_a_frozen_player_passes_a_gradient_on_and_keeps_none(digits, tmp_path):
    ((inside, left, after, passed),) = run_ranks(frozen, 1, config_of(digits, tmp_path, 0))
    assert not any(inside)
    assert not any(left)
    assert all(after)
    assert passed > 0


def beside_and_through(config):
    players, t = players_of(ADVERSARIAL, config), torch.rand(4)
    x, outputs = torch.randn(4, 16), []
    for turn, gradient in (("main", False), ("critic", True), ("critic", False)):
        with torch.set_grad_enabled(gradient):
            outputs.append(players.networks_for(turn)["critic"](x, t).detach())
    return [(output.dtype, output.float().numpy()) for output in outputs]


def test_beside_another_player_a_network_computes_in_the_precision_of_its_own_turn(digits, tmp_path):
    for stage in (0, 3):
        config = config_of(digits, tmp_path, stage, "deepspeed.precision=bf16_autocast")
        ((theirs, beside), (own, through), (without, exact)), _ = run_ranks(beside_and_through, 2, config)
        assert theirs == own == torch.bfloat16
        assert np.array_equal(beside, through)
        assert without == torch.float32  # of which differences can be taken
        assert np.abs(exact - through).max() < 0.05 * np.abs(exact).max()


def begun_from(config, path):
    """A new adversarial run's weights from a checkpoint that has only the backbone; then a load of it."""
    from dtrain.checkpoint.format import Checkpoint

    players, checkpoint = players_of(ADVERSARIAL, config), Checkpoint.open(path)
    before = copies(players)
    players.load_weights(checkpoint, "ema_0")
    players.refresh(0)
    with pytest.raises(UserError, match=r"is of another model: critic/first.bias has no elements there, 24 here"):
        players.load(checkpoint)
    with pytest.raises(UserError, match="critic"):
        players.load_state({})
    return before, copies(players), checkpoint.tensor("first.weight:ema_0")


def test_a_run_can_begin_with_the_backbone_of_one_that_had_no_critic_but_not_go_on_from_it(digits, tmp_path):
    folder, config = tmp_path / "checkpoints", config_of(digits, tmp_path, 0)
    folder.mkdir()
    run_ranks(train, 1, ALONE, config, range(2), None, folder)
    ((before, after, average),) = run_ranks(begun_from, 1, config, folder / "step-00000002")
    for key in ("fp32", "ema_0"):
        assert np.array_equal(after[f"first.weight:{key}", 0], average)
    assert all(np.array_equal(before[p], after[p]) for p in before if p[0].startswith("critic/"))


def of_one_loss(player, networks, batch):
    x, noise, t = batch
    return (networks["backbone"](x, t) - noise).square().mean(1)


ALONE = JOINT._replace(networks={"main": ("backbone",)}, losses=of_one_loss)


def an_idle_network(config):
    players = players_of(JOINT, config)
    with pytest.raises(UserError, match="no loss of player main in this step came from its schedule"):
        take(JOINT._replace(losses=of_one_loss), players, config, 0)


def test_a_network_left_out_of_all_losses_is_an_error_since_adam_would_move_it(digits, tmp_path):
    run_ranks(an_idle_network, 1, config_of(digits, tmp_path, 2))


def gathered(config):
    players, found = players_of(JOINT, config), {}
    take(JOINT, players, config, 0)
    for network in ("backbone", "schedule"):
        for key in ("fp32", "ema_0"):
            module = players.gather(key, ALLOCATE[network](), network)
            prefix = "" if network == "backbone" else "schedule/"
            found |= {f"{prefix}{n}:{key}": p.detach().flatten().numpy() for n, p in module.named_parameters()}
    return found, copies(players)


@pytest.mark.parametrize("stage", [1, 3])
def test_gathering_gives_the_network_that_was_asked_for(digits, tmp_path, stage):
    results = run_ranks(gathered, 2, config_of(digits, tmp_path, stage))
    tensors = whole([pieces for _, pieces in results])
    for found, _ in results:
        assert found.keys() == {name for name in tensors if name.endswith((":fp32", ":ema_0"))}
        assert all(np.array_equal(values, tensors[name]) for name, values in found.items())


def rounded_together(config):
    with pytest.raises(UserError, match=r"precision=bf16 .* backbone and schedule, .* take bf16_autocast"):
        players_of(JOINT, config)
    with pytest.raises(UserError, match=r"drifts at stage 0, which player critic"):
        players_of(ADVERSARIAL, config, zero_stage=0)


def test_plain_bf16_is_refused_where_it_would_go_wrong(digits, tmp_path):
    run_ranks(rounded_together, 1, config_of(digits, tmp_path, 2, "deepspeed.precision=bf16"))


def weights_at_start(config):
    return copies(players_of(ADVERSARIAL, config)), copies(players_of(JOINT, config))


def test_initial_weights_are_a_function_of_seed_network_and_name(digits, tmp_path):
    """Whatever the stage, and other ones for networks whose parameters have the same names."""
    first, third = (run_ranks(weights_at_start, 1, config_of(digits, tmp_path, stage))[0] for stage in (0, 3))
    for one, other in zip(first, third, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    against, joint = first
    assert np.array_equal(against["first.weight:fp32", 0], joint["first.weight:fp32", 0])
    assert not np.array_equal(against["first.weight:fp32", 0][:20], against["critic/first.weight:fp32", 0][:20])
