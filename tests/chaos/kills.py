"""SIGKILLs at every point where one can hurt, on the digits job; used by tests and by the campaign."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dtrain.chaos.campaign import Result, Undisturbed, play
from dtrain.chaos.job import Job
from dtrain.chaos.plan import Draw
from dtrain.chaos.schedule import (
    EVALUATION_POINTS,
    LOAD_POINTS,
    SAVE_POINTS,
    STEP_POINTS,
    Schedule,
    damage_after_a_kill,
    kill_in_a_save,
    kill_in_a_step,
    kill_in_an_evaluation,
    kill_while_loading,
    kill_while_replacing,
)
from tests.chaos.command import DTRAIN

VICTIMS = ("one", "all")


def in_saves(job: Job) -> list[Draw]:
    """One of each point and victims, and a damage for each kill in the place of a damaged checkpoint: 24 kills."""
    draws = [partial(kill_in_a_save, job, point, who, v) for point, who in SAVE_POINTS.items() for v in VICTIMS]
    return draws + [partial(kill_while_replacing, job, v) for v in VICTIMS]


def damages(number: int) -> list[Draw]:
    """Kills with a damage, after which a save comes by a damaged checkpoint."""
    return [partial(damage_after_a_kill, "a flipped bit")] * number


def elsewhere(job: Job) -> list[Draw]:
    """One of each point in steps, evaluations and loading, and victims: 16 kills."""
    draws = [partial(kill_in_a_step, point, v) for point in STEP_POINTS for v in VICTIMS]
    draws += [
        partial(kill_in_an_evaluation, job, point, who, v) for point, who in EVALUATION_POINTS.items() for v in VICTIMS
    ]
    return draws + [partial(kill_while_loading, point, v) for point in LOAD_POINTS for v in VICTIMS]


def killed(work: Path, draws, seed: int, change_shapes: bool) -> list[Result]:
    """Meet all of `draws(job)`; late in some rounds the run goes on in another shape."""
    job = Job.make(work, None, [], 2, None, DTRAIN)
    rng = np.random.default_rng(seed)
    schedule, shapes = Schedule(job, rng, draws(job)), job.shapes()

    def plans(state):
        plan = schedule.next(state)
        if plan is not None and change_shapes and state.step > 2 * state.steps // 3 and rng.random() < 0.3:
            shape = shapes[rng.integers(len(shapes))]
            plan = replace(plan, what=f"{plan.what}, then {shape}", shape=shape)
        return plan

    results = list(play(job, Undisturbed.train(job), plans, lambda met: not schedule.bag, launch=False))
    assert not schedule.bag
    return results


def table(results: list[Result]) -> str:
    return "\n".join(f"{r.plan.what}: from {r.recovered_to}, {r.difference}, {r.problems}" for r in results)
