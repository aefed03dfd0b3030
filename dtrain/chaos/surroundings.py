"""Faults of what a run depends on: disks, shards, memory, workers, numbers, other ranks, MLflow."""

import os
import shlex
from functools import partial

from dtrain.chaos.job import Job
from dtrain.chaos.plan import Draw, Plan, State, coming, kill, later, rank_for, stop_at

SMALL_SHARED_MEMORY = 16 * 2**10  # bytes: less than the batches that one worker makes ahead
WORKER = "data.workers=1"


def everything(job: Job) -> list[Draw]:
    """Every kind of them that this job can meet."""
    draws: list[Draw] = []
    if job.disk is not None:
        draws += [partial(full_disk, job, point) for point in ("step", "save:write", "save:fsync", "save:commit")]
    if not job.config.data.mix and "://" not in job.config.data.shards:
        draws += [partial(damaged_shard, job), partial(lone_failure, job)]
    draws += [no_mlflow, run_deleted, refused_key, killed_worker]
    if os.geteuid() == 0:
        draws.append(small_shared_memory)
    draws += [partial(bad_batches, job, number) for number in (1, 3)]
    if job.config.eval.every:
        draws.append(partial(bad_features, job))
    if job.shape.ranks > 1:
        draws += [partial(stall, point) for point in ("step", "step:moved")]
    return draws


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
    schedule += f"free at=step step={free} {filler}; {stop_at(free + 1)}"
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
    what = f"no MLflow server until a stop at step {step}"
    return Plan(what, "MLflow gone", stop_at(step), "stopped", mlflow="gone")


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
    return Plan(what, "NaN", stop_at(step), "stopped", poison=poison)


def stall(point: str, state: State, rng) -> Plan | None:
    """One rank stands still; the watchdogs have to find it."""
    step, rank = later(state, rng), rank_for("any", state, rng)
    if step is None:
        return None
    what = f"rank {rank} stands still at {point} {step}"
    return Plan(what, "stall", f"stall at={point} step={step} rank={rank}", "hang")


def run_deleted(state: State, rng) -> Plan | None:
    """Somebody deletes the run in MLflow while it trains; it stands still meanwhile, or it would be over before."""
    step = later(state, rng, room=2)
    if step is None:
        return None
    schedule = f"stall at=step step={step} seconds=10; {stop_at(step)}"
    return Plan(f"the run is deleted in MLflow at step {step}", "run deleted", schedule, "stopped", mlflow="deletes")


def refused_key(state: State, rng) -> Plan | None:
    step = later(state, rng)
    if step is None:
        return None
    what = f"SIGKILL of all ranks at step {step}, then a metric whose key MLflow refuses"
    return Plan(what, "refused key", kill("all", f"at=step step={step}", 0), "killed", odd_key=True)


def killed_worker(state: State, rng) -> Plan | None:
    """As the kernel does where memory is short: a data worker is a process of its own."""
    step, rank = later(state, rng, room=3), rank_for("any", state, rng)
    if step is None:
        return None
    schedule = f"sigkill_workers at=step step={step} rank={rank}; {stop_at(step + 2)}"
    what = f"SIGKILL of the data worker of rank {rank} at step {step}"
    return Plan(what, "worker killed", schedule, "stopped", (WORKER,))


def small_shared_memory(state: State, rng) -> Plan | None:
    what = f"/dev/shm of {SMALL_SHARED_MEMORY // 2**10} KiB"
    return Plan(what, "small shm", "", "refused", (WORKER,), shared_memory=SMALL_SHARED_MEMORY)


def lone_failure(job: Job, state: State, rng) -> Plan | None:
    """One rank's machine does not have the data: the others must not wait for it."""
    rank = rank_for("any", state, rng)
    alone = (rank, f"data.shards={job.work}/not-mounted")
    return Plan(f"rank {rank} fails before ranks meet", "lone failure", "", "refused", alone=alone)


def bad_features(job: Job, state: State, rng) -> Plan | None:
    """An evaluation whose features are not numbers, and a stop after it."""
    step, rank = coming(state, job.config.eval.every, rng), rank_for("any", state, rng)
    if step is None or step + 3 > state.steps:
        return None
    schedule = f"nan at=eval:features step={step} rank={rank}; {stop_at(step + 2)}"
    return Plan(f"NaN features in the evaluation of step {step}", "NaN feature", schedule, "stopped", fails=step)
