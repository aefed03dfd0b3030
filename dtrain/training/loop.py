"""The training loop: open what the run needs, then one step after the other.

    x_0 ~ data,  t ~ U,  eps ~ N(0, I),  gradient step on the process' loss        (Ho et al. 2020, Algorithm 1)

Every random number comes with the batch (design, decision 2), so a step is a function of (weights, images seen).
"""

import os
import time
from collections.abc import Callable
from functools import partial

from dtrain import distributed, faults
from dtrain.config import Config
from dtrain.data import manifest as manifests
from dtrain.data.names import SampleNames
from dtrain.data.streams import with_streams
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.process import build as build_process
from dtrain.errors import SharedError, UserError
from dtrain.lock import RunLock
from dtrain.run import Outcome, Position, RunDirectory
from dtrain.tracking.journal import events, highest_attempt
from dtrain.tracking.tracker import Tracker
from dtrain.training.bad_steps import BadSteps
from dtrain.training.batch import learning_rate, prepared, split, with_dropped_labels
from dtrain.training.data_health import DataHealth
from dtrain.training.division import rows_per_rank
from dtrain.training.engine import Engine
from dtrain.training.feed import Feed
from dtrain.training.goodput import Goodput, lost_steps
from dtrain.training.levels import StepLosses, memory
from dtrain.training.output import redirect_to_log
from dtrain.training.progress import TrainingProgress
from dtrain.training.reduction import StepReduction
from dtrain.training.saving import Saving
from dtrain.training.start import prepare, resume
from dtrain.training.stopping import StopRequest, deadline
from dtrain.training.throughput import Meter
from dtrain.training.watchdog import Watchdog


def train(config: Config) -> Outcome:
    """Train, or go on training, the run that `config` describes; called on every rank.

    Returns "finished", or "stopped" with a checkpoint after a signal, a `stop` file or the deadline. Raises UserError
    for what the user can mend; nothing of an existing run is overwritten before the checks are done.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    _, micro_batch = rows_per_rank(config, world_size)
    manifest = manifests.load_all(config.data)
    run = RunDirectory(config.run.path)
    config = with_streams(config, manifest, run)
    distributed.initialize()
    ends = distributed.on_rank_0(deadline, config.train.deadline, time.time())
    distributed.on_rank_0(manifests.check_all, manifest, config.data)
    if faults.scheduled():
        attempt = 1 + distributed.on_rank_0(lambda: highest_attempt(events(run.journal_file)))
        faults.arm(rank, attempt, distributed.gather_objects(os.getpid()))
    lock = RunLock(run.lock_file)
    changes = distributed.on_rank_0(prepare, run, lock, config, manifest)
    if rank != 0:
        redirect_to_log(run.logs)

    stop = StopRequest(run.stop_file if rank == 0 else None, ends)
    stop.listen()
    tracker = Tracker(run, rank)
    feed = Feed(config, manifest)
    bad_steps = BadSteps(config, SampleNames(config, manifest), tracker)
    watchdog, goodput = Watchdog(run, rank, config.train.hang_limit), Goodput(tracker)
    position, outcome = Position(), None
    try:
        engine = Engine(config, micro_batch)
        process = build_process(config.diffusion)
        position = resume(engine, process, run, config, bad_steps)
        context = {"data": manifest.hash, "batch_size": config.data.batch_size}
        context |= {"world_size": world_size, "zero_stage": config.deepspeed.zero_stage}
        if isinstance(process, GaussianDiffusion):
            context["snr"] = process.schedule.snr_ends

        def begin(position: Position, changes: dict[str, tuple], **more) -> None:
            """An attempt begins at `position`: now, and again whenever the run goes back."""
            about = context | {"skipped": bad_steps.skipped.ranges} | more
            if rank == 0:
                goodput.begin_attempt(lost_steps(run.journal_file, position))
            distributed.agree(tracker.begin, config, position, changes, about, engine.options)
            watchdog.attempt = tracker.attempt if rank == 0 else None
            feed.begin(position.images, bad_steps.skipped)

        begin(position, changes)
        position, outcome = steps(
            config, run, manifest, engine, process, position, feed, bad_steps, begin, tracker, stop, watchdog, goodput
        )
        if rank == 0:
            why = stop.reason or "another rank was asked to" if outcome == "stopped" else None
            run.write_outcome(outcome, position.step, tracker.attempt, why)
    except UserError as e:
        run.write_outcome("user_error", position.step, message=str(e))
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


def steps(
    config: Config,
    run: RunDirectory,
    manifest: manifests.Manifest,
    engine: Engine,
    process: GaussianDiffusion | RectifiedFlow,
    position: Position,
    feed: Feed,
    bad_steps: BadSteps,
    begin: Callable[..., None],
    tracker: Tracker,
    stop: StopRequest,
    watchdog: Watchdog,
    goodput: Goodput,
) -> tuple[Position, Outcome]:
    """From `position` to config.train.steps, or to where the ranks agree to stop."""
    device, batch_size, rank = distributed.device(), config.data.batch_size, distributed.rank()
    progress = TrainingProgress(config.train.steps, position.step, visible=rank == 0)
    saving = Saving(run, config, manifest.hash, position, tracker, progress)
    if position.step < config.train.steps:
        distributed.on_rank_0(saving.require_room, engine)
    evaluation = None
    reduction = StepReduction(rank, distributed.world_size(), batch_size)
    meter = Meter(config, distributed.world_size(), device)
    health = DataHealth(config, manifest, position, tracker)
    stopping = False
    if position.step:
        progress.say(f"{run.path}: going on after step {position.step}")

    def hear() -> bool:
        """Act on the reduction begun last; every rank has the same sums. Whether a checkpoint would find no room."""
        nonlocal stopping
        if (sums := reduction.finish()) is None:
            return False
        if sums.error:
            feed.raise_on_all()
        watchdog.heard(sums.step_seconds)
        saving.heard(sums)
        stopping = stopping or sums.stop
        health.heard(sums)
        if (refused := bad_steps.heard(sums)) is not None:
            progress.say(refused)
            return sums.no_room
        meter.heard(sums)
        step = sums.position.step
        if step % config.train.log_every == 0 or step == config.train.steps:
            metrics = {"loss": sums.loss, "grad_norm": sums.grad_norm, "lr": learning_rate(config, step)}
            tracker.write("train", sums.position, metrics | meter.metrics() | health.metrics(sums.position.images))
            progress.update(step, sums.loss, batch_size / meter.seconds_per_step, meter.seconds_per_step)
            meter.restart()
            goodput.journal_now_and_then(sums.position)
        return sums.no_room

    def save() -> None:
        with watchdog.during("saving"), goodput.during("save_stall_s"):
            saving.begin(position, engine, memory(process), bad_steps=bad_steps.state())

    def settle() -> None:
        with watchdog.during("saving"), goodput.during("save_stall_s"):
            saving.settle()

    def go_back() -> Position:
        """To the newest whole checkpoint, and from there around the images that were refused last."""
        bad_steps.leave_out(position)
        settle()
        goodput.end_attempt(position)
        with watchdog.during("start"):
            found = resume(engine, process, run, config, bad_steps, anew=True)
            saving.went_back(found)
            why = f"{config.train.bad_steps} steps in a row were refused"
            progress.say(f"back from step {position.step} to {found.step}, to leave out images: {why}")
            begin(found, {}, back_from=position.step, why=why)
        goodput.train()
        meter.restart()
        return found

    goodput.train()
    watchdog.beat(position.step)
    try:
        while position.step < config.train.steps and not stopping:
            faults.at("step", position.step + 1)
            started = time.perf_counter()
            images = bad_steps.batch(position.images)
            batch = prepared(feed.next(images[0][0]), config, position, bad_steps.skipped)
            health.journal(feed.report, position)
            poisoned = any(faults.poisons(first, last) for first, last in images)
            step_losses = StepLosses(process, device)
            for part in split(batch, engine.micro_batch):
                labels = with_dropped_labels(part, config)
                model = partial(engine, keys=part["dropout"]) if "dropout" in part else engine
                losses = process.losses(model, part["image"], part["noise"], part["time"], labels)  # (n,)
                if poisoned:
                    losses = losses * float("nan")
                engine.backward(losses.mean())
                step_losses.add(part, losses)
            faults.at("step:update")
            limit = bad_steps.limit
            grad_norm = engine.step(learning_rate(config, position.step + 1), limit)
            faults.at("step:moved")
            taken = bad_steps.judge(grad_norm, limit, images)
            if taken:
                step_losses.observe(distributed.world_size())
            position = Position(position.step + taken, images[-1][1])
            if taken and position.step == 1:  # not before: a mistake is one line
                say_ends(process, progress)
            if evaluation is None and config.eval.every:
                opening = time.perf_counter()
                with watchdog.during("start"), goodput.during("evaluation_s"):
                    evaluation = evaluation_of(run, config, process, tracker, progress)
                meter.restart()
                started += time.perf_counter() - opening  # no part of a step, whose time sets the limit of a hang

            hear()
            last = position.step == config.train.steps
            save_due = last or (taken and position.step % config.train.checkpoint_every == 0)
            save_due = save_due or (stopping and position.step != saving.begun)
            evaluation_due = evaluation is not None and taken and (last or position.step % config.eval.every == 0)
            goodput.step(taken, feed.seconds, batch_size)
            step_seconds = time.perf_counter() - started
            reduction.start(
                position,
                step_losses.sum,
                grad_norm,
                step_losses.by_level(),
                taken=taken,
                stop=stop.wanted(meter.seconds_per_step, saving.seconds),
                written=saving.written,
                failed=saving.failed,
                no_room=save_due and rank == 0 and saving.lacks_room(engine),
                error=feed.error is not None,
                read=feed.report,
                step_seconds=step_seconds,
                data_seconds=feed.seconds,
            )
            if save_due or evaluation_due or stopping or bad_steps.too_many:
                no_room = hear()  # the journal must not lack a step that a checkpoint holds
            if bad_steps.too_many:
                position = go_back()
            elif save_due:
                saving.skip(position) if no_room else save()
            if evaluation_due and not stopping:
                settle()  # a kill during a long evaluation must not cost the checkpoint
                with watchdog.during("evaluation"), goodput.during("evaluation_s"):
                    evaluation.run(engine, position)
                meter.restart()
            watchdog.beat(position.step, step_seconds)
        settle()
        if saving.newest.step != position.step and saving.problem is None:
            save()
            settle()
        # Rank 0 commits, and has journaled by then: the launcher kills it once another rank has left.
        newest, problem = distributed.gather_objects((saving.newest, saving.problem))[0]
        if newest.step != position.step:
            raise SharedError(
                f"{run.path} ended at step {position.step}, but its newest checkpoint is of step {newest.step}: "
                f"{problem}; make room and start it again"
            )
    finally:
        progress.close()
        goodput.journal(position)
    if position.step < config.train.steps:
        progress.say(f"stopped after step {position.step}: {stop.reason or 'another rank was asked to'}")
        return position, "stopped"
    return position, "finished"


def say_ends(process: GaussianDiffusion | RectifiedFlow, progress: TrainingProgress) -> None:
    if isinstance(process, GaussianDiffusion):
        most, least = process.schedule.snr_ends
        progress.say(f"signal-to-noise ratio: {most:.5g} at the first timestep, {least:.5g} at the last")


def evaluation_of(*arguments):
    """The run's Evaluation: after the first step, which its imports and its reference would keep waiting, and no later,
    so that what could not be evaluated is told at once.
    """
    from dtrain.training.evaluation import Evaluation

    return Evaluation(*arguments)
