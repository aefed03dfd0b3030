"""The training loop: open what the run needs, then one step after the other.

    x_0 ~ data,  t ~ U,  eps ~ N(0, I),  gradient step on the process' loss        (Ho et al. 2020, Algorithm 1)

Every random number comes with the batch (design, decision 2), so a step is a function of (weights, images seen).
"""

import math
import os
import time
from collections.abc import Iterator
from functools import partial

import torch

from dtrain import distributed, faults
from dtrain.config import Config
from dtrain.data import manifest as manifests
from dtrain.data.stream import train_batches
from dtrain.data.streams import with_streams
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.process import build as build_process
from dtrain.diffusion.times import stratified
from dtrain.errors import UserError
from dtrain.lock import RunLock
from dtrain.models.dropout import dropout_keys
from dtrain.run import Outcome, Position, RunDirectory
from dtrain.tracking.journal import events, highest_attempt
from dtrain.tracking.tracker import Tracker
from dtrain.training.data_health import DataHealth
from dtrain.training.division import rows_per_rank
from dtrain.training.engine import Engine
from dtrain.training.feed import Feed
from dtrain.training.levels import StepLosses, memory
from dtrain.training.output import redirect_to_log
from dtrain.training.progress import TrainingProgress
from dtrain.training.reduction import StepReduction
from dtrain.training.saving import Saving
from dtrain.training.start import prepare, resume
from dtrain.training.stopping import StopRequest, deadline
from dtrain.training.throughput import Meter


def train(config: Config) -> Outcome:
    """Train, or go on training, the run that `config` describes; called on every rank.

    Returns "finished", or "stopped" with a checkpoint after a signal, a `stop` file or the deadline. Raises UserError
    for what the user can mend; nothing of an existing run is overwritten before the checks are done.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    _, micro_batch = rows_per_rank(config, world_size)
    manifest = manifests.load_all(config.data)
    config = with_streams(config, manifest)
    distributed.initialize()
    ends = distributed.on_rank_0(deadline, config.train.deadline, time.time())
    distributed.on_rank_0(manifests.check_all, manifest, config.data)
    run = RunDirectory(config.run.path)
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
    position, feed, outcome = Position(), None, None
    try:
        engine = Engine(config, micro_batch)
        process = build_process(config.diffusion)
        position = resume(engine, process, run, config)
        context = {"data": manifest.hash, "world_size": world_size, "zero_stage": config.deepspeed.zero_stage}
        if isinstance(process, GaussianDiffusion):
            context["snr"] = process.schedule.snr_ends
        tracker.begin(config, position, changes, context, engine.options)
        feed = Feed(config, train_batches(config, manifest, rank, world_size, position.images))
        position, outcome = steps(config, run, manifest, engine, process, position, feed, tracker, stop)
        if rank == 0:
            why = stop.reason or "another rank was asked to" if outcome == "stopped" else None
            run.write_outcome(outcome, position.step, tracker.attempt, why)
    except UserError as e:
        run.write_outcome("user_error", position.step, message=str(e))
        raise
    finally:
        if feed is not None:
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
    tracker: Tracker,
    stop: StopRequest,
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
        saving.heard(sums)
        stopping = stopping or sums.stop
        meter.heard(sums)
        health.heard(sums)
        step = sums.position.step
        if step % config.train.log_every == 0 or step == config.train.steps:
            metrics = {"loss": sums.loss, "grad_norm": sums.grad_norm, "lr": learning_rate(config, step)}
            tracker.write("train", sums.position, metrics | meter.metrics() | health.metrics(sums.position.images))
            progress.update(step, sums.loss, batch_size / meter.seconds_per_step, meter.seconds_per_step)
            meter.restart()
        return sums.no_room

    try:
        while position.step < config.train.steps and not stopping:
            faults.at("step", position.step + 1)
            started = time.perf_counter()
            batch = prepared(feed.next(position.images), config, position)
            health.journal(feed.report, position)
            poisoned = faults.poisons(position.images, position.images + batch_size)
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
            grad_norm = engine.step(learning_rate(config, position.step + 1))
            faults.at("step:moved")
            if math.isfinite(grad_norm):
                step_losses.observe(distributed.world_size())
            position = Position(position.step + 1, position.images + batch_size)
            if position.step == 1 and isinstance(process, GaussianDiffusion):  # not before: a mistake is one line
                most, least = process.schedule.snr_ends
                progress.say(f"signal-to-noise ratio: {most:.5g} at the first timestep, {least:.5g} at the last")
            if evaluation is None and config.eval.every:
                evaluation = evaluation_of(run, config, process, tracker, progress)
                meter.restart()

            hear()
            last = position.step == config.train.steps
            save_due = last or stopping or position.step % config.train.checkpoint_every == 0
            evaluation_due = evaluation is not None and (last or position.step % config.eval.every == 0)
            reduction.start(
                position,
                step_losses.sum,
                grad_norm,
                step_losses.by_level(),
                stop=stop.wanted(meter.seconds_per_step, saving.seconds),
                written=saving.written,
                failed=saving.failed,
                no_room=save_due and rank == 0 and saving.lacks_room(engine),
                error=feed.error is not None,
                read=feed.report,
                step_seconds=time.perf_counter() - started,
                data_seconds=feed.seconds,
            )
            if save_due or evaluation_due:
                no_room = hear()  # the journal must not lack a step that a checkpoint holds
            if save_due:
                saving.skip(position) if no_room else saving.begin(position, engine, memory(process))
            if evaluation_due and not stopping:
                saving.settle()  # a kill during a long evaluation must not cost the checkpoint
                evaluation.run(engine, position)
                meter.restart()
        saving.settle()
        if saving.newest != position and saving.problem is None:
            saving.begin(position, engine, memory(process))
            saving.settle()
        if saving.newest != position:
            distributed.barrier()  # rank 0 has journaled by then; the launcher kills it once another rank has left
            raise UserError(
                f"{run.path} ended at step {position.step}, but its newest checkpoint is of step {saving.newest.step}: "
                f"{saving.problem}; make room and start it again"
            )
    finally:
        progress.close()
    if position.step < config.train.steps:
        progress.say(f"stopped after step {position.step}: {stop.reason or 'another rank was asked to'}")
        return position, "stopped"
    return position, "finished"


def evaluation_of(*arguments):
    """The run's Evaluation: after the first step, which its imports and its reference would keep waiting, and no later,
    so that what could not be evaluated is told at once.
    """
    from dtrain.training.evaluation import Evaluation

    return Evaluation(*arguments)


def prepared(batch: dict[str, torch.Tensor], config: Config, position: Position) -> dict[str, torch.Tensor]:
    """The batch with what only some configs draw: times spread evenly over the global batch, keys of dropout."""
    if config.diffusion.stratified:
        spread = stratified(batch["time"], batch["k"], position.images, config.data.batch_size, config.run.seed)
        batch = batch | {"time": spread}
    if getattr(config.model, "dropout", 0.0):
        batch = batch | {"dropout": dropout_keys(config.run.seed, batch["k"])}
    return batch


def split(batch: dict[str, torch.Tensor], micro_batch: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(batch["k"]), micro_batch):
        yield {k: v[start : start + micro_batch] for k, v in batch.items()}


def with_dropped_labels(batch: dict[str, torch.Tensor], config: Config) -> torch.Tensor:
    """Labels (n,) int64, a share of them replaced by the null label, for classifier-free guidance."""
    if not config.model.num_classes:
        return batch["label"]
    drop = batch["drop"] < config.diffusion.label_dropout
    return torch.where(drop, config.model.num_classes, batch["label"])


def learning_rate(config: Config, step: int) -> float:
    """Of step 1, 2, …: linear warm-up, then constant."""
    return config.optim.lr * min(1.0, step / max(1, config.optim.warmup_steps))
