"""A training on one rank, from its config to its outcome: open what the run needs, take the steps, close it all."""

import os
import time
from functools import partial

from dtrain import distributed, faults
from dtrain.checkpoint import teacher
from dtrain.config import Config
from dtrain.data import shared_memory
from dtrain.data.order.names import SampleNames
from dtrain.data.shards import manifest as manifests
from dtrain.errors import SharedFailure, UserError
from dtrain.first_stage.build import build as build_first_stage
from dtrain.first_stage.requirements import about as about_first_stage
from dtrain.interrupt import ctrl_c
from dtrain.lock import RunLock
from dtrain.objectives.build import build as build_objective
from dtrain.run import Outcome, RunDirectory
from dtrain.terminal import say
from dtrain.tracking.journal import highest_attempt, outline
from dtrain.tracking.tracker import Tracker
from dtrain.training.check import check_inputs, warnings
from dtrain.training.division import rows_per_rank
from dtrain.training.feed import Feed
from dtrain.training.identity import resolved
from dtrain.training.players import build as build_players
from dtrain.training.record.goodput import Goodput
from dtrain.training.record.output import leave_terminal, redirect_to_log
from dtrain.training.safety.agreement import check_agreement
from dtrain.training.safety.bad_steps import BadSteps
from dtrain.training.safety.stopping import StopRequest, deadline
from dtrain.training.safety.watchdog import Watchdog
from dtrain.training.start import prepare, resume
from dtrain.training.steps import Steps
from dtrain.training.tf32 import set_tf32


def train(config: Config) -> Outcome:
    """Train, or go on training, the run that `config` describes; called on every rank.

    Returns "finished", or "stopped" with a checkpoint after a signal, a `stop` file or the deadline. Raises UserError
    for what the user can mend, and SharedFailure where data workers broke; nothing of an existing run is overwritten
    before the checks are done.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    _, micro_batch = rows_per_rank(config.data.batch_size, config.train.micro_batch, world_size)
    manifest = manifests.load_all(config.data)
    run = RunDirectory(config.run.path)
    config = resolved(run, config, manifest)
    distributed.initialize()
    set_tf32(config.train.tf32)
    check_agreement(config, manifest)
    lacking = distributed.on_rank_0(check_inputs, config, manifest)
    distributed.agree(shared_memory.check, config, world_size, distributed.ranks_here())
    ends = distributed.on_rank_0(deadline, config.train.deadline, time.time())
    if scheduled := faults.scheduled():
        attempt = 1 + distributed.on_rank_0(lambda: highest_attempt(outline(run.journal_file)))
        faults.arm(rank, attempt, distributed.gather_objects(os.getpid()))
        if rank == 0:
            say(f"DTRAIN_FAULTS arms faults on purpose in this run: {scheduled}")
    lock = RunLock(run.lock_file)
    ctrl_c.on_leaving(lock.release)  # which does nothing where it was not acquired
    tracker = Tracker(run, rank)
    changes = distributed.on_rank_0(prepare, run, lock, config, manifest, tracker)
    if rank != 0:
        redirect_to_log(run.logs)
    else:
        for line in (*lacking, *about_first_stage(config, manifest), *warnings(config)):
            say(line)

    stop = StopRequest(run.stop_file if rank == 0 else None, ends, partial(leave_terminal, run.logs))
    stop.listen()
    objective = build_objective(config, teacher.reader(config))
    feed = Feed(config, manifest)
    names = SampleNames(config.data, config.run.seed, manifest)
    bad_steps = BadSteps(config.train, config.data.batch_size, names, tracker, list(objective.turns))
    watchdog = Watchdog(run, rank, config.train.hang_limit, config.train.start_limit)
    goodput = Goodput(tracker)
    steps, outcome = None, None
    try:
        first_stage = distributed.agree(build_first_stage, config, manifest, distributed.device())
        distributed.agree(objective.open, distributed.device())
        players = build_players(config, objective, micro_batch)
        position = resume(players, objective, run, config, bad_steps, data=manifest.hash, first_stage=first_stage)
        steps = Steps(
            config,
            run,
            manifest,
            first_stage,
            players,
            objective,
            position,
            feed,
            bad_steps,
            tracker,
            stop,
            watchdog,
            goodput,
        )
        outcome = steps.take(changes)
        distributed.agree(players.check_base)
        if rank == 0:
            run.write_outcome(outcome, steps.position.step, tracker.attempt, stop.why if outcome == "stopped" else None)
    except (UserError, SharedFailure) as e:
        ended = "user_error" if isinstance(e, UserError) else "crashed"
        run.write_outcome(ended, steps.position.step if steps else 0, message=str(e))
        raise
    finally:
        watchdog.close()
        feed.close()
        unsent = tracker.close(outcome == "finished")
        stop.restore()
        if rank == 0:
            lock.release()
    if unsent:
        print(f"{unsent} journal lines are not in MLflow yet; send them with: dtrain sync {run.path}")
    return outcome
