"""The learning rate by steps and by images seen: closed forms, and what each optimizer of a run got."""

import json
import math

import pytest
from torch import nn

from dtrain.config import validate
from dtrain.config.training import Optim
from dtrain.errors import UserError
from dtrain.position import Position
from dtrain.tracking.journal import read
from dtrain.training.check import warnings
from dtrain.training.learning_rate import factor, learning_rate
from tests.digits import tiny
from tests.ranks import run_ranks

COSINE = {"schedule": "cosine", "decay_end": 1000}
LATE_COSINE = {"schedule": "cosine", "decay_start": 400, "decay_end": 1000}
LINEAR = {"schedule": "linear", "decay_end": 1000}
LATE_LINEAR = {"schedule": "linear", "decay_start": 400, "decay_end": 1000}
INVERSE_SQRT = {"schedule": "inverse_sqrt", "decay_start": 100}
TRAPEZOID = {"schedule": "trapezoid", "decay_end": 1000, "decay_share": 0.25}


@pytest.mark.parametrize(
    ("keys", "images", "expected"),
    [
        ({}, 10**12, 1),
        (COSINE, 0, 1),
        (COSINE, 250, (1 + math.sqrt(0.5)) / 2),
        (COSINE, 500, 0.5),
        (COSINE, 750, (1 - math.sqrt(0.5)) / 2),
        (COSINE, 1000, 0),
        (COSINE, 5000, 0),
        (LATE_COSINE, 400, 1),
        (LATE_COSINE, 600, 0.75),  # (1 + cos 60°)/2
        (LATE_COSINE, 700, 0.5),
        (LATE_COSINE, 800, 0.25),
        (LINEAR, 0, 1),
        (LINEAR, 300, 0.7),
        (LINEAR, 1000, 0),
        (LINEAR, 1001, 0),
        (LATE_LINEAR, 399, 1),
        (LATE_LINEAR, 550, 0.75),
        (INVERSE_SQRT, 0, 1),
        (INVERSE_SQRT, 100, 1),
        (INVERSE_SQRT, 400, 0.5),
        (INVERSE_SQRT, 10_000, 0.1),
        (TRAPEZOID, 0, 1),
        (TRAPEZOID, 750, 1),
        (TRAPEZOID, 800, 0.8),
        (TRAPEZOID, 950, 0.2),
        (TRAPEZOID, 1000, 0),
        (TRAPEZOID, 2000, 0),
    ],
)
def test_each_schedule_is_its_closed_form(keys, images, expected):
    assert factor(Optim(**keys), images) == pytest.approx(expected, abs=1e-15)


def test_the_inverse_square_root_is_that_of_edm2():
    """α(t) = α_ref / sqrt(max(t / t_ref, 1)) with XS on ImageNet 512: 0.0120, 70,000 batches of 2,048."""
    t_ref = 143_360_000
    optim = Optim(lr=0.0120, schedule="inverse_sqrt", decay_start=t_ref)
    for images, expected in (
        (0, 0.0120),
        (t_ref, 0.0120),
        (4 * t_ref, 0.0060),
        (2**31, 0.0120 * (t_ref / 2**31) ** 0.5),
    ):
        assert learning_rate(optim, Position(10**6, images)) == pytest.approx(expected, rel=1e-15)


def test_the_warm_up_goes_by_steps_and_multiplies_the_schedule():
    optim = Optim(lr=0.01, warmup_steps=4, **LINEAR)
    assert learning_rate(optim, Position(0, 0)) == pytest.approx(0.01 / 4)
    assert learning_rate(optim, Position(1, 500)) == pytest.approx(0.01 * 2 / 4 * 0.5)
    assert learning_rate(optim, Position(4, 900)) == pytest.approx(0.01 * 0.1)


def test_without_a_schedule_the_rate_is_what_it_always_was_bit_for_bit():
    optim = Optim(lr=3e-4, warmup_steps=7)
    for step in range(20):
        assert learning_rate(optim, Position(step, 13 * step)) == 3e-4 * min(1.0, (step + 1) / 7)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule": "cosine"}, "schedule cosine needs decay_end"),
        ({"schedule": "linear", "decay_start": 5}, "schedule linear needs decay_end"),
        ({"schedule": "inverse_sqrt"}, "schedule inverse_sqrt needs decay_start"),
        ({"schedule": "inverse_sqrt", "decay_start": 0}, "schedule inverse_sqrt needs decay_start, not 0"),
        ({"schedule": "trapezoid", "decay_end": 9}, "schedule trapezoid needs decay_share"),
        ({"decay_end": 9}, "decay_end 9 has no effect on schedule constant; leave it out"),
        ({**INVERSE_SQRT, "decay_end": 9}, "decay_end 9 has no effect on schedule inverse_sqrt"),
        ({**COSINE, "decay_share": 0.1}, "decay_share 0.1 has no effect on schedule cosine"),
        ({**TRAPEZOID, "decay_start": 9}, "decay_start 9 has no effect on schedule trapezoid"),
        ({"schedule": "linear", "decay_start": 9, "decay_end": 9}, "decay_start 9 is not before decay_end 9"),
        ({"schedule": "cosin"}, "`optim.schedule` in x.yaml is 'cosin': input should be 'constant'"),
        ({**TRAPEZOID, "decay_share": 1.5}, "`optim.decay_share` in x.yaml is 1.5: "),
    ],
)
def test_what_a_schedule_lacks_or_has_no_use_for_is_refused_in_one_line(keys, message):
    base = {"data": {"shards": "d", "image_size": 8, "channels": 1, "batch_size": 8}, "train": {"steps": 1}}
    with pytest.raises(UserError) as error:
        validate(base | {"model": {"name": "dit", "size": "S/2"}, "optim": keys}, "x.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_steps_that_the_schedule_leaves_no_rate_are_said(digits, tmp_path):
    overrides = ["optim.schedule=linear", "optim.decay_end=240"]
    (line,) = warnings(tiny(digits, tmp_path, *overrides, "train.steps=20"))  # 480 images
    assert line.startswith("optim.decay_end 240: the learning rate is 0 from there on, and the run sees 480 images")
    assert warnings(tiny(digits, tmp_path, *overrides, "train.steps=10")) == []


class Judge(nn.Module):
    """Pictures of digits (n, 1, 8, 8) → (n,)."""

    def __init__(self):
        super().__init__()
        from dtrain.models.layers import Linear

        self.layer = Linear(64, 1)

    @staticmethod
    def initial_value(name, shape, seed):
        from dtrain.models.layers import ConditionNetworks

        return ConditionNetworks.initial_value(name, shape, seed)

    def forward(self, x):
        return self.layer(x.flatten(1))[:, 0]


def rates(digits, folder, overrides):
    """Train with a second optimizer, whose `optim` is the objective's; player → the rate of each of its steps."""
    from typing import Literal

    from dtrain import plugins
    from dtrain.config.parts import PartSection
    from dtrain.objectives.build import denoising
    from dtrain.objectives.objective import Losses, Objective, Turn
    from dtrain.training.player import Player
    from dtrain.training.run_training import train

    class TwoRates(Objective):
        networks = {"judge": Judge}  # noqa: RUF012

        def __init__(self, config):
            self._denoising = denoising(config.diffusion)
            self.process = self._denoising.process
            self.turns = {"main": Turn(("backbone",)), "judge": Turn(("judge",), config.objective.optim, False)}

        def losses(self, turn, networks, batch, condition, at):
            if turn == "main":
                return self._denoising.losses(turn, networks, batch, condition, at)
            return Losses((networks["judge"](batch["x_0"]) - 3).square())

        def losses_at(self, network, x0, noise, place, condition):
            return self._denoising.losses_at(network, x0, noise, place, condition)

    class TwoRatesSection(PartSection):
        kind: Literal["two_rates"]
        optim: Optim

        def build(self, config):
            return TwoRates(config)

    plugins.register("objective", "two_rates", TwoRatesSection)
    seen, step = {}, Player.step

    def watched(self, lr, *limit):
        groups = step(self, lr, *limit)
        seen.setdefault(self.name, []).append(self.optimizer.param_groups[0]["lr"])
        return groups

    Player.step = watched
    train(tiny(digits, folder, *overrides))
    return seen


def test_every_optimizer_follows_its_own_schedule_by_images_and_goes_on_at_another_batch_size(digits, tmp_path):
    judge = {"lr": 0.01, **TRAPEZOID, "decay_end": 480}
    overrides = [
        *("optim.lr=0.001", "optim.warmup_steps=0", "optim.schedule=cosine", "optim.decay_end=480"),
        f"objective={json.dumps({'kind': 'two_rates', 'optim': judge})}",
    ]
    (first,) = run_ranks(rates, 1, digits, tmp_path, [*overrides, "train.steps=10"])
    seen = run_ranks(rates, 2, digits, tmp_path, [*overrides, "data.batch_size=12", "train.steps=30"])
    images = [24 * step for step in range(10)] + [240 + 12 * step for step in range(20)]
    main = [0.001 * (1 + math.cos(math.pi * n / 480)) / 2 for n in images]
    for rank in seen:
        assert first["main"] + rank["main"] == pytest.approx(main, rel=1e-12)
        assert first["judge"] + rank["judge"] == pytest.approx([0.01 * min(1, (480 - n) / 120) for n in images])
    lines = [line for line in read(tmp_path / "tiny/journal.jsonl") if line["event"] == "train"]
    assert [line["metrics"]["lr"] for line in lines] == pytest.approx(main, rel=1e-12)
