"""A network that is computed with and not trained: read from its source at every start, in no checkpoint."""

from functools import partial

import numpy as np
import pytest
import torch

from dtrain.errors import UserError
from dtrain.models.layers import normal
from dtrain.objectives.objective import Held
from tests.ranks import run_ranks
from tests.training.toys import ALLOCATE, BATCH, PIXELS, Toy, Toys, batch_of, config_of, copies, take, whole

SOURCE = {name: normal(name, shape, 99, std=0.5) for name, shape in (
    ("first.weight", (20, PIXELS + 1)), ("first.bias", (20,)), ("last.weight", (PIXELS, 20)), ("last.bias", (PIXELS,))
)}  # fmt: skip
STEPS = 6


def losses(_, networks, batch):
    x, _, t = batch
    return (networks["backbone"](x, t) - networks["teacher"](x, t)).square().mean(1)


DISTILLED = Toys({"main": ("backbone", "teacher")}, losses)


def players_of(config, source=SOURCE, fingerprint="sha256 of it"):
    from dtrain.training.player import Player
    from dtrain.training.players import Players

    networks = {"backbone": ALLOCATE["backbone"], "teacher": partial(Toy, 20, PIXELS)}
    return Players([Player(config, 2, networks, held={"teacher": Held(fingerprint, lambda: source)})])


def distilled(config):
    """(pieces, norms, the teacher's weights afterwards, tensors of a checkpoint)."""
    players = players_of(config)
    norms = [take(DISTILLED, players, config, step)["main"] for step in range(STEPS)]
    teacher = players.gather("fp32", Toy(20, PIXELS), "teacher")
    weights = {name: p.detach().numpy().copy() for name, p in teacher.named_parameters()}
    return copies(players), norms, weights, sorted(players.tensor_sizes()), players.held


def by_plain_pytorch(config):
    from dtrain.models.layers import initialize

    student, teacher = ALLOCATE["backbone"](), Toy(20, PIXELS)
    initialize(student, config.run.seed)
    teacher.load_state_dict(SOURCE)
    optimizer = torch.optim.AdamW(student.parameters(), config.optim.lr, config.optim.betas, 1e-8, 0.1)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses(None, {"backbone": student, "teacher": teacher}, batch_of(step)).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), config.optim.gradient_clip).item())
        optimizer.step()
    return {name: p.detach().numpy().ravel() for name, p in student.named_parameters()}, norms


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2), (3, 2)])
def test_what_is_held_teaches_as_in_plain_pytorch_and_stays_out_of_checkpoints(digits, tmp_path, stage, ranks):
    assert BATCH % ranks == 0
    config = config_of(digits, tmp_path, stage)
    weights, norms = by_plain_pytorch(config)
    results = run_ranks(distilled, ranks, config)
    ours = whole([pieces for pieces, *_ in results])
    for name, expected in weights.items():
        np.testing.assert_allclose(ours[f"{name}:fp32"], expected, rtol=1e-5, atol=1e-7)
    for _, measured, teacher, saved, held in results:
        assert measured == pytest.approx(norms, rel=1e-5)
        assert all(np.array_equal(teacher[name], SOURCE[name].numpy()) for name in SOURCE)
        assert not any("teacher" in name for name in saved)
        assert held == {"teacher": "sha256 of it"}


def wrong_source(config):
    try:
        players_of(config, SOURCE | {"first.bias": torch.zeros(21)})
    except UserError as e:
        return str(e)


def test_weights_of_another_network_are_refused(digits, tmp_path):
    (said,) = run_ranks(wrong_source, 1, config_of(digits, tmp_path, 3))
    assert said == "the weights of teacher are another network's: first.bias, [20] here, has the shape [21]"


def against_others(config):
    players, said = players_of(config), []
    for theirs in ({"teacher": "sha256 of it"}, {"teacher": "another"}, {}, {"teacher": "sha256 of it", "base": "x"}):
        try:
            players.check_held(theirs)
            said.append(None)
        except UserError as e:
            said.append(str(e))
    return said


def test_a_run_goes_on_with_no_other_held_network(digits, tmp_path):
    ((same, another, none, more),) = run_ranks(against_others, 1, config_of(digits, tmp_path, 0))
    assert same is None
    assert another.endswith("another there, sha256 of it here")
    assert none.endswith("none there, sha256 of it here")
    assert "another base" in more
