"""Which fault comes next: drawn by a seed from a bag that holds every kind at every point, so that none is left out.

A fault is planned for the run as it stands: at the next save where it belongs to a save, at the next evaluation where
it belongs to one. What cannot happen now (no checkpoint to damage yet) waits in the bag.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from dtrain.chaos import surroundings
from dtrain.chaos.damage import DAMAGES, Damage
from dtrain.chaos.job import Job, Shape
from dtrain.chaos.plan import Draw, Plan, State, coming, kill, later, rank_for

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
        self.bag.sort(
            key=lambda draw: getattr(draw, "func", draw) not in (kill_while_replacing, surroundings.bad_batches)
        )

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
        draws.append(partial(kill_while_replacing, job, victims))
        if job.config.eval.every:
            draws += [partial(kill_in_an_evaluation, job, p, who, victims) for p, who in EVALUATION_POINTS.items()]
    draws += [partial(damage_after_a_kill, kind) for kind in DAMAGES]
    draws += [stop, stop]
    draws += [partial(other_shape, job, shape) for shape in job.shapes()[:: max(1, len(job.shapes()) // 4)]]
    draws += surroundings.everything(job)
    return draws


def kill_of(victims: str, rank: int, where: str) -> str:
    return f"SIGKILL of {'all ranks' if victims == 'all' else f'rank {rank}'} at {where}"


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
    return Plan(kill_of(victims, rank, place), f"SIGKILL of {victims}", kill(victims, where, rank), "killed")


def kill_in_a_step(point: str, victims: str, state: State, rng) -> Plan | None:
    step, rank = later(state, rng), rank_for("any", state, rng)
    if step is None:
        return None
    what = kill_of(victims, rank, f"{point} {step}")
    return Plan(what, f"SIGKILL of {victims}", kill(victims, f"at={point} step={step}", rank), "killed")


def kill_while_loading(point: str, victims: str, state: State, rng) -> Plan | None:
    rank = rank_for("any", state, rng)
    if not state.whole:
        return None
    return Plan(
        kill_of(victims, rank, f"{point} of step {state.step}"),
        f"SIGKILL of {victims}",
        kill(victims, f"at={point}", rank),
        "killed",
    )


def kill_while_replacing(job: Job, victims: str, state: State, rng) -> Plan | None:
    """While a damaged checkpoint that a save comes by again gives way to a whole one; by one of a stop none comes."""
    ahead = [s for s in state.damaged if s > state.step and s % job.config.train.checkpoint_every == 0]
    if not ahead:
        return None
    what = kill_of(victims, 0, f"save:replace of step {ahead[0]}")
    schedule = kill(victims, f"at=save:replace step={ahead[0]}", 0)
    return Plan(what, f"SIGKILL of {victims}", schedule, "killed")


def kill_in_an_evaluation(job: Job, point: str, who: str, victims: str, state: State, rng) -> Plan | None:
    step, rank = coming(state, job.config.eval.every, rng), rank_for(who, state, rng)
    if step is None:
        return None
    what = kill_of(victims, rank, f"{point} of step {step}")
    return Plan(what, f"SIGKILL of {victims}", kill(victims, f"at={point} step={step}", rank), "killed")


def damage_after_a_kill(kind: str, state: State, rng) -> Plan | None:
    """Damage the newest checkpoint, while there is an older one to go back to."""
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
