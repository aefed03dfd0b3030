"""A step of several optimizers: what moves where one of them is refused, and what the run knows of it afterwards."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.first_stage.pixels import Pixels
from dtrain.models.layers import ConditionNetworks, Linear
from dtrain.objectives.objective import Losses, Objective, Turn
from tests.digits import tiny
from tests.ranks import run_ranks

BATCH = 24


class Judge(nn.Module):
    """Pictures of digits (n, 1, 8, 8) → (n,)."""

    initial_value = staticmethod(ConditionNetworks.initial_value)

    def __init__(self):
        super().__init__()
        self.layer = Linear(64, 1)

    def forward(self, x):
        return self.layer(x.flatten(1))[:, 0]


class CountedPixels(Pixels):
    made = 0

    def of_batch(self, batch):
        self.made += 1
        return super().of_batch(batch)


class ThreeTurns(Objective):
    turns = {name: Turn((network,), averaged=name == "main") for name, network in  # noqa: RUF012
             (("main", "backbone"), ("second", "first_judge"), ("third", "other_judge"))}  # fmt: skip
    networks = {"first_judge": Judge, "other_judge": Judge}  # noqa: RUF012
    parts = ("height",)

    def __init__(self):
        self.called = []

    def losses(self, turn, networks, batch, condition, at):
        self.called.append(turn)
        x_0 = batch["x_0"]
        if turn == "main":
            answer = networks["backbone"](x_0, torch.zeros(len(x_0)), **condition)
            rows = (answer - 1).square().flatten(1).mean(1)
            return Losses(rows, batch["time"], {"height": (rows.detach().sum(), len(rows))})
        network = {"second": "first_judge", "third": "other_judge"}[turn]
        return Losses((networks[network](x_0) - 3).square())


def steps_of_three_turns(config, refused):
    """Whether each step was taken and what moved in it, by the network; then the state of what was judged."""
    from dtrain import distributed
    from dtrain.conditions.build import build as build_conditions
    from dtrain.data.shards.manifest import load_all
    from dtrain.data.stream import Completion, StepDataset
    from dtrain.position import Position
    from dtrain.training.players import build as build_players
    from dtrain.training.record.levels import StepLosses, named_sums
    from dtrain.training.safety.bad_steps import BadSteps
    from dtrain.training.step import Step

    objective, first_stage = ThreeTurns(), CountedPixels()
    players = build_players(config, objective, 6)
    step = Step(first_stage, build_conditions(config), objective, players, config.model.draws())
    rank, ranks = distributed.rank(), distributed.world_size()
    batches, complete = StepDataset(config, load_all(config.data), rank, ranks, 0), Completion(config)
    bad, found = BadSteps(config.train, config.data.batch_size, None, None, list(objective.turns)), []
    for number, turn in enumerate(refused):
        before = {(p.name, p.start): p.values.clone() for p in players.pieces()}
        objective.called.clear()
        seen = StepLosses(objective, torch.device("cpu"))
        norms, taken = step.take(
            complete(batches[number]),
            Position(number, number * BATCH),
            learning_rate=lambda turn: 1e-3,
            judge=lambda own, norm, limit, n=number: bad.judge(norm, limit, [(n * BATCH, n * BATCH + BATCH)], own),
            limit=lambda own, refused=turn: 0.0 if own == refused else bad.limit(own),
            on_losses=seen.add,
        )
        mine = [p.name for p in players.pieces() if not torch.equal(p.values, before[p.name, p.start])]
        names = [name for names in distributed.gather_objects(mine) for name in names]
        moved = {"backbone" if "/" not in name else name.partition("/")[0] for name in names}
        assert seen.named.keys() <= set(named_sums(objective))
        found.append((taken, sorted(moved), list(dict.fromkeys(objective.called)), sorted(norms)))
    assert first_stage.made == len(refused) * BATCH // ranks // 6  # once a micro-batch, however many turns
    return found, bad.state(), bad.too_many, [player.optimizer_steps for player in players]


def test_turns_before_a_refused_one_stay_moved_and_those_after_it_do_not_happen(digits, tmp_path):
    config = tiny(digits, tmp_path, f"data.batch_size={BATCH}", "deepspeed.zero_stage=2", "train.bad_steps=3")
    refused = [None, "second", "second", "third", "second", "main", "second"]
    results = run_ranks(steps_of_three_turns, 2, config, refused)
    all_turns, all_networks = ["main", "second", "third"], ["backbone", "first_judge", "other_judge"]
    for found, state, too_many, optimizer_steps in results:
        assert found[0] == (True, all_networks, all_turns, all_turns)
        second = (False, ["backbone"], ["main", "second"], ["main", "second"])
        assert [found[i] for i in (1, 2, 4, 6)] == [second] * 4
        assert found[3] == (False, ["backbone", "first_judge"], all_turns, all_turns)
        assert found[5] == (False, [], ["main"], ["main"])
        assert optimizer_steps == [6, 2, 1]
        # In a row are two refusals of `second`: step 3 took it. A turn that did not happen ends no streak.
        turns = state["turns"]
        assert [len(state["refused"]), len(turns["second"]["refused"]), len(turns["third"]["refused"])] == [0, 2, 1]
        assert not too_many
        assert [len(state["norms"]), len(state["turns"]["second"]["norms"])] == [6, 2]
    assert results[0] == results[1]


def test_what_a_checkpoint_holds_of_each_turns_norms_and_refusals_comes_back(digits, tmp_path):
    from dtrain.training.safety.bad_steps import FEWEST, BadSteps

    config, turns = tiny(digits, tmp_path), ["main", "critic"]
    bad = BadSteps(config.train, config.data.batch_size, None, None, turns)
    for number in range(FEWEST):
        for turn, scale in (("main", 1.0), ("critic", 50.0)):
            assert bad.judge(scale * (1 + number / 100), bad.limit(turn), [(number, number + 1)], turn)
    assert bad.limit("critic") == 50 * bad.limit("main")  # each is judged by its own
    for number in range(3):
        assert not bad.judge(np.inf, bad.limit("critic"), [(100 + number, 101 + number)], "critic")
    assert bad.too_many
    again = BadSteps(config.train, config.data.batch_size, None, None, turns)
    state = json.loads(json.dumps(bad.state()))
    BadSteps.check(state)
    again.load_state(state)
    assert (again.limit("main"), again.limit("critic")) == (bad.limit("main"), bad.limit("critic"))
    assert again.too_many
    assert again.refused == {"main": [], "critic": [[(100, 101)], [(101, 102)], [(102, 103)]]}


def test_damage_in_what_is_said_of_turns_is_found():
    from dtrain.training.safety.bad_steps import BadSteps

    for turns in (3, {"critic": {"norms": ["x"]}}, {"critic": {"refused": [[[2, 1]]]}}):
        with pytest.raises(ValueError, match="which steps were refused"):
            BadSteps.check({"turns": turns})
