"""The training loop: open what the run needs, then one step after the other.

    x_0 ~ data,  t ~ U,  eps ~ N(0, I),  gradient step on the process' loss        (Ho et al. 2020, Algorithm 1)

Every random number comes with the batch (design, decision 2), so a step is a function of (weights, images seen).
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dtrain import distributed
from dtrain.config import Config
from dtrain.data import manifest as manifests
from dtrain.data.stream import train_batches
from dtrain.diffusion.process import build as build_process
from dtrain.errors import UserError
from dtrain.models.build import build as build_model
from dtrain.run import Position, RunDirectory
from dtrain.tracking.tracker import Tracker
from dtrain.training.engine import Engine, rows_per_rank
from dtrain.training.evaluation import Evaluation
from dtrain.training.output import redirect_to_log
from dtrain.training.progress import TrainingProgress
from dtrain.training.reduction import StepReduction
from dtrain.training.saving import Saving
from dtrain.training.start import prepare, resume, with_streams


def train(config: Config) -> None:
    """Train, or go on training, the run that `config` describes; called on every rank.

    Raises UserError for what the user can mend; nothing of an existing run is overwritten before the checks are done.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    _, micro_batch = rows_per_rank(config, world_size)
    manifest = manifests.load(config.data.manifest_path)
    config = with_streams(config, manifest)
    distributed.initialize()
    distributed.on_rank_0(manifests.check_shards, manifest, Path(config.data.shards))
    run = RunDirectory(config.run.path)
    changes = distributed.on_rank_0(prepare, run, config, manifest)
    if rank != 0:
        redirect_to_log(run.logs)

    tracker = Tracker(run, rank)
    position = Position()
    batches, finished = None, False
    try:
        engine = Engine(build_model(config), config, micro_batch)
        position = resume(engine, run)
        context = {"data": manifest.hash, "world_size": world_size, "zero_stage": config.deepspeed.zero_stage}
        tracker.begin(config, position, changes, context)
        batches = train_batches(config, manifest, rank, world_size, position.images)
        position = steps(config, run, engine, position, batches, manifest.hash, tracker)
        finished = True
        if rank == 0:
            run.write_outcome("finished", position.step, tracker.attempt)
    except UserError as e:
        run.write_outcome("user_error", position.step, message=str(e))
        raise
    finally:
        if batches is not None:
            batches.close()
        unsent = tracker.close(finished)
    if unsent:
        print(f"{unsent} journal lines are not in MLflow yet; send them with: dtrain sync {run.path}")


def steps(
    config: Config,
    run: RunDirectory,
    engine: Engine,
    position: Position,
    batches: Iterator[dict[str, torch.Tensor]],
    data: str,
    tracker: Tracker,
) -> Position:
    """From `position` to config.train.steps; returns where it ended."""
    device, batch_size = distributed.device(), config.data.batch_size
    process = build_process(config.diffusion)
    progress = TrainingProgress(config.train.steps, position.step, visible=distributed.rank() == 0)
    saving = Saving(run, config, data, tracker, progress)
    evaluation = Evaluation(run, config, process, tracker, progress) if config.eval.every else None
    reduction = StepReduction(distributed.world_size(), batch_size)
    meter = Meter(batch_size)
    if position.step:
        progress.say(f"{run.path}: going on after step {position.step}")

    def hear() -> None:
        """Act on the reduction of the step before; every rank has the same sums."""
        if (sums := reduction.finish()) is None:
            return
        saving.heard(sums)
        step = sums.position.step
        meter.steps += 1
        if step % config.train.log_every == 0 or step == config.train.steps:
            metrics = {"loss": sums.loss, "grad_norm": sums.grad_norm, "lr": learning_rate(config, step)}
            tracker.write("train", sums.position, metrics | {"images_per_second": meter.images_per_second})
            progress.update(step, sums.loss, meter.images_per_second, meter.seconds_per_step)
            meter.restart()

    try:
        while position.step < config.train.steps:
            batch = to_device(next(batches), device)
            loss_sum = torch.zeros((), device=device)
            for part in split(batch, micro_batch=engine.micro_batch):
                labels = with_dropped_labels(part, config)
                losses = process.losses(engine, part["image"], part["noise"], part["time"], labels)  # (n,)
                engine.backward(losses.mean())
                loss_sum += losses.detach().sum()
            grad_norm = engine.step(learning_rate(config, position.step + 1))
            position = Position(position.step + 1, position.images + batch_size)

            hear()
            reduction.start(position, loss_sum, grad_norm, saving.written, saving.failed)
            last = position.step == config.train.steps
            save_due = last or position.step % config.train.checkpoint_every == 0
            evaluation_due = evaluation is not None and (last or position.step % config.eval.every == 0)
            if save_due or evaluation_due:
                hear()  # the journal must not lack a step that a checkpoint holds
            if save_due:
                saving.begin(position, engine)
            if evaluation_due:
                saving.settle()  # a kill during a long evaluation must not cost the checkpoint
                evaluation.run(engine, position)
                meter.restart()
        saving.settle()
    finally:
        progress.close()
    return position


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return batch if device.type == "cpu" else {k: v.to(device, non_blocking=True) for k, v in batch.items()}


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


class Meter:
    """Throughput since the last restart."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        self._since, self.steps = time.perf_counter(), 0

    @property
    def seconds_per_step(self) -> float:
        return (time.perf_counter() - self._since) / max(1, self.steps)

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.seconds_per_step
