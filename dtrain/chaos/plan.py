"""A fault as it is planned for a run that stands at some step, and the moments at which one can happen."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dtrain.chaos.damage import Damage
from dtrain.chaos.job import Shape


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
    ends: str  # killed | stopped | user_error | hang | refused (before the run is touched)
    overrides: tuple[str, ...] = ()
    damage: Damage | None = None  # done to the newest checkpoint after the attempt
    shape: Shape | None = None  # of the attempts after it
    shard: int | None = None  # damaged while the attempt runs: the one that this image of the run comes from
    mlflow: str = ""  # gone: the server is not there; deletes: it deletes the run meanwhile
    odd_key: bool = False  # after the attempt the journal holds a metric whose key MLflow refuses
    shared_memory: int | None = None  # bytes of /dev/shm
    fails: int | None = None  # the step of an evaluation that must be journaled as failed
    alone: tuple[int, str] | None = None  # a rank, and a setting that only it is given
    poison: str = ""  # of DTRAIN_FAULTS, in every attempt of the round from its first

    @property
    def can_be_launched(self) -> bool:
        """A launcher starts all ranks alike, on the machine as it is."""
        return self.alone is None and self.shared_memory is None


Draw = Callable[[State, np.random.Generator], Plan | None]


def kill(victims: str, where: str, rank: int) -> str:
    """The schedule of one SIGKILL: of `rank`, or of all once it is there."""
    return f"{'sigkill_all' if victims == 'all' else 'sigkill'} {where} rank={rank}"


def stop_at(step: int) -> str:
    """The schedule of a SIGTERM to rank 0, which all ranks follow."""
    return f"sigterm at=step step={step} rank=0"


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
