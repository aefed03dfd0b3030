"""Which fault comes next: drawn by a seed from a bag that holds every kind at every point, so that none is forgotten.

A fault is planned for the run as it stands: at the next save where it belongs to a save, at the next evaluation where
it belongs to one. What cannot happen now (no checkpoint to damage yet) waits in the bag.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from dtrain.chaos.damage import DAMAGES, Damage
from dtrain.chaos.job import Job, Shape

SAVE_POINTS = {  # who can die there
    "save:stage": "any",
    "save:write": "any",
    "save:fsync": "any",
    "save:index": "any",
    "save:rename": "any",
    "save:written": "any",
    "save:commit": "any",
    "save:manifest": "rank 0",
    "save:committed": "rank 0",
    "save:journal": "any",
    "save:remove": "rank 0",
}
STEP_POINTS = ("step", "step:update", "step:moved")
EVALUATION_POINTS = {"eval": "any", "eval:draw": "any", "eval:journal": "rank 0"}
LOAD_POINTS = ("load", "load:done")


@dataclass(frozen=True)
class State:
    """The run between two attempts."""

    step: int  # of the newest whole checkpoint, 0 without one
    whole: int  # number of whole checkpoints
    damaged: tuple[int, ...]  # steps whose damaged checkpoint still lies there
    shape: Shape
    steps: int  # of the whole round


@dataclass(frozen=True)
class Plan:
    """A fault, the attempt that meets it, and how that must end."""

    what: str
    kind: str
    schedule: str  # of DTRAIN_FAULTS
    ends: str  # killed | stopped | user_error | hang
    overrides: tuple[str, ...] = ()
    damage: Damage | None = None  # done to the newest checkpoint after the attempt
    shape: Shape | None = None  # of the attempts after it
    shard: int | None = None  # damaged while the attempt runs: the one that this image of the run comes from
    mlflow: bool = False  # the tracking server is not there
    poison: str = ""  # of DTRAIN_FAULTS, in every attempt of the round from its first


Draw = Callable[[State, np.random.Generator], Plan | None]


@dataclass
class Schedule:
    """job: what kinds apply. rng: all choices come from it. bag: the draws left; of every kind, if none are given."""

    job: Job
    rng: np.random.Generator
    bag: list[Draw] | None = None

    def __post_init__(self):
        self._refills = self.bag is None
        self.bag = self.bag or []
        self._shuffle()

    def _shuffle(self) -> None:
        self.bag = [self.bag[i] for i in self.rng.permutation(len(self.bag))]
        # What is possible only after a damage, or when a round begins, comes first, or its moment has passed.
        self.bag.sort(key=lambda draw: getattr(draw, "func", draw) not in (kill_while_replacing, bad_batches))

    def next(self, state: State) -> Plan | None:
        """A fault that can happen now; None where the round has too few steps left for any."""
        for i, draw in enumerate(self.bag):
            if (plan := draw(state, self.rng)) is not None:
                del self.bag[i]
                return plan
        if not self._refills or state.step:
            return None
        self.bag += everything(self.job)
        self._shuffle()
        return self.next(state)


def everything(job: Job) -> list[Draw]:
    """Every kind of fault that this job can meet."""
    draws: list[Draw] = []
    one_and_all = ("one", "all") if job.shape.ranks > 1 else ("one",)
    for victims in one_and_all:
        for point, who in SAVE_POINTS.items():
            draws.append(partial(kill_in_a_save, job, point, who, victims))
        draws += [partial(kill_in_a_step, point, victims) for point in STEP_POINTS]
        draws += [partial(kill_while_loading, point, victims) for point in LOAD_POINTS]
        draws.append(partial(kill_while_replacing, victims))
        if job.config.eval.every:
            draws += [partial(kill_in_an_evaluation, job, p, who, victims) for p, who in EVALUATION_POINTS.items()]
    draws += [partial(damage_after_a_kill, kind) for kind in DAMAGES]
    draws += [stop, stop]
    draws += [partial(other_shape, job, shape) for shape in job.shapes()[:: max(1, len(job.shapes()) // 4)]]
    if job.disk is not None:
        draws += [partial(full_disk, job, point) for point in ("step", "save:write", "save:fsync", "save:commit")]
    if not job.config.data.mix and "://" not in job.config.data.shards:
        draws.append(partial(damaged_shard, job))
    draws.append(no_mlflow)
    draws += [partial(bad_batches, job, number) for number in (1, 3)]
    if job.shape.ranks > 1:
        draws += [partial(stall, point) for point in ("step", "step:moved")]
    return draws


def kill(victims: str, where: str, rank: int) -> str:
    """The schedule of one SIGKILL: of `rank`, or of all once it is there."""
    return f"{'sigkill_all' if victims == 'all' else 'sigkill'} {where} rank={rank}"


def told(victims: str, rank: int, where: str) -> str:
    return f"SIGKILL of {'all ranks' if victims == 'all' else f'rank {rank}'} at {where}"


def rank_for(who: str, state: State, rng: np.random.Generator) -> int:
    return 0 if who == "rank 0" else int(rng.integers(state.shape.ranks))


def coming(state: State, every: int, rng: np.random.Generator) -> int | None:
    """The next multiple of `every` or the one after; None where the round ends before."""
    following = (state.step // every + 1) * every
    found = [s for s in (following, following + every) if s < state.steps]
    return int(rng.choice(found)) if found else None


def later(state: State, rng: np.random.Generator, room: int = 1) -> int | None:
    """A step soon after the newest checkpoint, with `room` more before the end of the round."""
    last = min(state.step + 14, state.steps - room)
    return int(rng.integers(state.step + 2, last + 1)) if last >= state.step + 2 else None


def kill_in_a_save(job: Job, point: str, who: str, victims: str, state: State, rng) -> Plan | None:
    step = coming(state, job.config.train.checkpoint_every, rng)
    if step is None or (point == "save:remove" and state.whole < job.config.train.keep_last):
        return None
    if point == "save:remove":
        step = (state.step // job.config.train.checkpoint_every + 1) * job.config.train.checkpoint_every
    rank = rank_for(who, state, rng)
    most = {"save:stage": 4, "save:write": 2, "save:rename": 2 if rank == 0 else 1}.get(point, 1)
    skip = int(rng.integers(most))
    where = f"at={point}" + (f" step={step}" if point != "save:remove" else "") + (f" skip={skip}" if skip else "")
    place = f"{point} of step {step}" + (f", time {skip + 1}" if most > 1 else "")
    return Plan(told(victims, rank, place), f"SIGKILL of {victims}", kill(victims, where, rank), "killed")


def kill_in_a_step(point: str, victims: str, state: State, rng) -> Plan | None:
    step, rank = later(state, rng), rank_for("any", state, rng)
    if step is None:
        return None
    what = told(victims, rank, f"{point} {step}")
    return Plan(what, f"SIGKILL of {victims}", kill(victims, f"at={point} step={step}", rank), "killed")


def kill_while_loading(point: str, victims: str, state: State, rng) -> Plan | None:
    rank = rank_for("any", state, rng)
    if not state.whole:
        return None
    return Plan(
        told(victims, rank, f"{point} of step {state.step}"),
        f"SIGKILL of {victims}",
        kill(victims, f"at={point}", rank),
        "killed",
    )


def kill_while_replacing(victims: str, state: State, rng) -> Plan | None:
    """While a damaged checkpoint that a save comes by again gives way to a whole one."""
    ahead = [s for s in state.damaged if s > state.step]
    if not ahead:
        return None
    what = told(victims, 0, f"save:replace of step {ahead[0]}")
    schedule = kill(victims, f"at=save:replace step={ahead[0]}", 0)
    return Plan(what, f"SIGKILL of {victims}", schedule, "killed")


def kill_in_an_evaluation(job: Job, point: str, who: str, victims: str, state: State, rng) -> Plan | None:
    step, rank = coming(state, job.config.eval.every, rng), rank_for(who, state, rng)
    if step is None:
        return None
    what = told(victims, rank, f"{point} of step {step}")
    return Plan(what, f"SIGKILL of {victims}", kill(victims, f"at={point} step={step}", rank), "killed")


def damage_after_a_kill(kind: str, state: State, rng) -> Plan | None:
    """Of the newest checkpoint, while there is an older one to go back to."""
    step = later(state, rng)
    if state.whole < 2 or step is None:
        return None
    what = f"{kind} of the newest checkpoint after a kill at step {step}"
    schedule = kill("all", f"at=step step={step}", 0)
    return Plan(what, "damage", schedule, "killed", damage=Damage(kind, int(rng.integers(2**31))))


def stop(state: State, rng) -> Plan | None:
    step, rank = later(state, rng, room=2), rank_for("any", state, rng)
    if step is None:
        return None
    return Plan(
        f"SIGTERM to rank {rank} at step {step}", "SIGTERM", f"sigterm at=step step={step} rank={rank}", "stopped"
    )


def other_shape(job: Job, shape: Shape, state: State, rng) -> Plan | None:
    step = later(state, rng)
    if step is None or step < 2 * state.steps // 3:  # late, because losses agree to 1e-5 from then on, not bit for bit
        return None
    schedule = kill("all", f"at=step step={step}", 0)
    what = f"SIGKILL of all ranks at step {step}, then {shape}"
    return Plan(what, "another shape", schedule, "killed", shape=shape)


def full_disk(job: Job, point: str, state: State, rng) -> Plan | None:
    """Full from the next save's `point` until after the following one; then a stop, for which there must be room."""
    every = job.config.train.checkpoint_every
    step = (state.step // every + 1) * every
    if step + every + 4 > state.steps:
        return None
    filler = f"{shlex.quote(f'path={job.disk}/filler')} rank=0"
    free = step + every + 2
    schedule = f"fill at={point} step={step} {filler}; "
    for again in range(step + 1, free):  # what a failed save gave back
        schedule += f"fill at=step step={again} {filler}; "
    schedule += f"free at=step step={free} {filler}; sigterm at=step step={free + 1} rank=0"
    where = f"{point} of step {step}" if point.startswith("save") else f"step {step}"
    return Plan(f"full disk from {where} to step {free}", "full disk", schedule, "stopped")


def damaged_shard(job: Job, state: State, rng) -> Plan | None:
    step = later(state, rng, room=2)
    if step is None:
        return None
    image = (step - 1) * job.config.data.batch_size
    overrides = (f"data.shards={job.work}/damaged", "data.on_error=raise")
    what = f"a damaged shard, read at step {step} or before"
    return Plan(what, "damaged shard", "", "user_error", overrides, shard=image)


def no_mlflow(state: State, rng) -> Plan | None:
    step = later(state, rng, room=2)
    if step is None:
        return None
    schedule = f"sigterm at=step step={step} rank=0"
    return Plan(f"no MLflow server until a stop at step {step}", "MLflow gone", schedule, "stopped", mlflow=True)


def bad_batches(job: Job, number: int, state: State, rng) -> Plan | None:
    """Losses of so many batches in a row that are not numbers, each time they are met; for a round from its first step.

    The undisturbed run that such a round is compared with meets the same batches.
    """
    if state.whole:
        return None
    size, first = job.config.data.batch_size, int(rng.integers(7, 12))
    step = first + int(rng.integers(4, 8))
    poison = f"nan images={first * size}:{(first + number) * size} rank={rng.integers(state.shape.ranks)}"
    what = f"{number} batch{'es' if number > 1 else ''} of NaN losses after step {first}, a stop at step {step}"
    return Plan(what, "NaN", f"sigterm at=step step={step} rank=0", "stopped", poison=poison)


def stall(point: str, state: State, rng) -> Plan | None:
    """One rank stands still; the watchdogs have to find it."""
    step, rank = later(state, rng), rank_for("any", state, rng)
    if step is None:
        return None
    what = f"rank {rank} stands still at {point} {step}"
    return Plan(what, "stall", f"stall at={point} step={step} rank={rank}", "hang")
