"""One step after the other, and what is due between them: word from all ranks, checkpoints, evaluations, a way back.

The step itself is `training/step.py`.
"""

import contextlib
import time
from dataclasses import dataclass

from dtrain import distributed, faults
from dtrain.conditions.build import build as build_conditions
from dtrain.config import Config
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import SharedError
from dtrain.first_stage.build import statement
from dtrain.first_stage.pixels import FirstStage
from dtrain.objectives.objective import Objective
from dtrain.position import Position
from dtrain.run import Outcome, RunDirectory
from dtrain.tracking.metadata import trained_on
from dtrain.tracking.tracker import Tracker
from dtrain.training.feed import Feed
from dtrain.training.learning_rate import learning_rate
from dtrain.training.players import Players
from dtrain.training.record.goodput import Goodput
from dtrain.training.record.levels import StepLosses, further_norms, named_sums
from dtrain.training.record.progress import TrainingProgress
from dtrain.training.record.throughput import Meter
from dtrain.training.reduction import StepReduction
from dtrain.training.safety.bad_steps import BadSteps
from dtrain.training.safety.data_health import DataHealth
from dtrain.training.safety.latents import about_first, not_finite
from dtrain.training.safety.stopping import StopRequest
from dtrain.training.safety.watchdog import Watchdog
from dtrain.training.saving import Saving
from dtrain.training.start import resume
from dtrain.training.step import Step

EVALUATION_TRIES = 2  # of a step's, over starts


@dataclass
class Steps:
    """The steps of a run on one rank, from `position` on; every rank calls the same methods at the same positions."""

    config: Config
    run: RunDirectory
    manifest: Manifest
    first_stage: FirstStage
    players: Players
    objective: Objective
    position: Position
    feed: Feed
    bad_steps: BadSteps
    tracker: Tracker
    stop: StopRequest
    watchdog: Watchdog
    goodput: Goodput

    def __post_init__(self):
        config, rank, world_size = self.config, distributed.rank(), distributed.world_size()
        self._is_rank_0 = rank == 0
        self._one = Step(self.first_stage, build_conditions(config), self.objective, self.players, config.model.draws())
        self._progress = TrainingProgress(config.train.steps, self.position.step, visible=self._is_rank_0)
        made = self.manifest.hash, statement(self.first_stage)
        self._saving = Saving(self.run, config, *made, self.position, self.tracker, self._progress)
        more = named_sums(self.objective), self.objective.sums
        self._reduction = StepReduction(rank, world_size, config.data.batch_size, *more)
        self._meter = Meter(config, world_size, distributed.device())
        self._health = DataHealth(
            config.data, config.run.seed, self.manifest, self.position, self.tracker, self._progress.say
        )
        self._began = self.position  # before the step whose reduction was begun last
        self._reduced = self.position  # after the last step that all ranks had a batch for, as far as they know
        self._evaluation = None
        self._owes_evaluation = False  # of where the run is: it was cut off, or gave way to a stop
        self._stopping = False
        self._listens = False  # to Ctrl-C: what comes before the first step, and its compilation, is lost with nobody

    def take(self, changes: dict[str, tuple]) -> Outcome:
        """Up to config.train.steps, or to where the ranks agree to stop; a checkpoint is there in either case.

        changes: the config's keys that differ from the last start, with both values, for the journal. Raises UserError
        where there is no room for a checkpoint, SharedError where the last one could not be written.
        """
        steps = self.config.train.steps
        with contextlib.closing(self._progress):
            self._begin(changes)
            if self.position.step < steps:
                distributed.on_rank_0(self._saving.require_room, self.players)
            if self.position.step:
                done = "" if self.position.step < steps else f", and train.steps is {steps}: nothing is left to train"
                self._progress.say(f"{self.run.path}: going on after step {self.position.step}{done}")
            self.goodput.train()
            self._go_on()
            try:
                if self._evaluation_due() and distributed.on_rank_0(self._lacks_evaluation):
                    self._evaluate()
                self.watchdog.beat(self.position.step)
                while self.position.step < steps and not self._stopping:
                    self._step()
                self._end()
            finally:
                self.goodput.journal(self.position)
        if self.position.step < steps or self._owes_evaluation:
            self._progress.say(f"stopped after step {self.position.step}: {self.stop.why}")
            return "stopped"
        return "finished"

    def _begin(self, changes: dict[str, tuple], **more) -> None:
        """An attempt begins where the run is: once at the start, and again whenever it goes back."""
        about = {"data": self.manifest.hash, "batch_size": self.config.data.batch_size}
        about["datasets"] = trained_on(self.manifest, self.config.data)
        about |= {"world_size": distributed.world_size(), "zero_stage": self.config.deepspeed.zero_stage}
        if self.objective.snr_ends is not None:
            about["snr"] = self.objective.snr_ends
        about |= {"skipped": self.bad_steps.skipped.ranges} | more
        if scheduled := faults.scheduled():
            about["faults_on_purpose"] = scheduled
        lost = distributed.agree(self.tracker.begin, self.config, self.position, changes, about, self.players.options)
        self.goodput.begin_attempt(lost)
        self.tracker.attempt = distributed.on_rank_0(lambda: self.tracker.attempt)
        self.watchdog.attempt = self.tracker.attempt if self._is_rank_0 else None
        distributed.agree(self.feed.begin, self.position.images, self.bad_steps.skipped)

    def _step(self) -> None:
        """A batch and what is due after it: word from all ranks, a checkpoint, an evaluation, a way back."""
        config, bad_steps = self.config, self.bad_steps
        faults.at("step", self.position.step + 1)
        started, began = time.perf_counter(), self.position
        if self.objective.sums:
            self._on_reduced()  # what the step computes with
        seen, norms, taken = self._update()
        if not self._listens:
            self._listens = True
            self.stop.listen_to_ctrl_c(distributed.barrier, self._progress.say)
        if self._evaluation is None and config.eval.every:
            opening = time.perf_counter()
            self._open_evaluation()
            started += time.perf_counter() - opening  # no part of a step, whose time sets the limit of a hang

        self._on_reduced()
        step = self.position.step
        last = step == config.train.steps
        save_due = last or (taken and config.saves_after(step))
        save_due = save_due or (self._stopping and step != self._saving.tried)
        evaluation_due = taken and self._evaluation_due()
        self.goodput.step(taken, self.feed.seconds, config.data.batch_size)
        step_seconds = time.perf_counter() - started
        self._began = began
        self._reduction.start(
            self.position,
            seen.sum,
            next(iter(norms.values())),
            seen.by_level(),
            taken=taken,
            stop=self._stop_wanted(),
            written=self._saving.written,
            failed=self._saving.failed,
            no_room=save_due and self._is_rank_0 and self._saving.lacks_room(self.players),
            error=self.feed.error is not None,
            read=self.feed.report,
            step_seconds=step_seconds,
            data_seconds=self.feed.seconds,
            named=seen.named | further_norms(norms),
            vectors=seen.vectors,
        )
        if save_due or evaluation_due or self._stopping or bad_steps.too_many:
            no_room = self._on_reduced()  # the journal must not lack a step that a checkpoint holds
        if bad_steps.too_many:
            self._go_back()
        elif save_due:
            self._saving.skip(self.position) if no_room else self._save()
        if evaluation_due:
            self._settle()  # a kill during a long evaluation must not cost the checkpoint
            self._evaluate()
        self.watchdog.beat(self.position.step, step_seconds)

    def _update(self) -> tuple[StepLosses, dict[str, float], bool]:
        """(this rank's losses, each turn's norm, whether the step was taken) of the next batch; moves `position`."""
        bad_steps, position = self.bad_steps, self.position
        images = bad_steps.batch(position.images)
        batch = self.feed.next(images[0][0])
        self._health.journal(self.feed.report, position)
        seen = StepLosses(self.objective, distributed.device())
        norms, taken = self._one.take(
            batch,
            position,
            learning_rate=lambda turn: self._learning_rate(turn, position),
            limit=bad_steps.limit,
            judge=lambda turn, norm, limit: bad_steps.judge(norm, limit, images, turn),
            on_losses=seen.add,
            meanwhile=self.feed.ahead,
            spoilt=any(faults.poisons(first, last) for first, last in images),
        )
        if taken:
            seen.observe(distributed.world_size())
        elif self.feed.error is None and (
            error := not_finite(self.first_stage, batch, self.players.micro_batch, bad_steps.names)
        ):
            self.feed.fail(error)
        self.position = Position(position.step + taken, images[-1][1])
        if taken and position.step == 0 and self.objective.snr_ends is not None:
            most, least = self.objective.snr_ends  # not said before: a mistake is one line
            self._progress.say(f"signal-to-noise ratio: {most:.5g} at the first timestep, {least:.5g} at the last")
        if taken and position.step == 0 and self.config.first_stage.kind == "kl":
            for line in about_first(self.first_stage, self.config, batch, self.players.micro_batch):
                self._progress.say(line)
        return seen, norms, taken

    def _learning_rate(self, turn: str, at: Position) -> float:
        return learning_rate(self.objective.turns[turn].optim or self.config.optim, at)

    def _on_reduced(self) -> bool:
        """Act on the reduction begun last; every rank has the same sums. Whether a checkpoint would find no room."""
        if (sums := self._reduction.finish()) is None:
            return False
        if sums.error:
            self._save_before_the_end()
            self.feed.raise_on_all()
        self._reduced = sums.position
        self.watchdog.on_reduced(sums.step_seconds)
        self._saving.on_reduced(sums)
        self._stopping = self._stopping or sums.stop
        self._health.on_reduced(sums)
        if (refused := self.bad_steps.on_reduced(sums)) is not None:
            self._progress.say(refused)
            return sums.no_room
        self.objective.on_reduced(sums.vectors)
        self._meter.on_reduced(sums)
        config, step = self.config, sums.position.step
        if step % config.train.log_every == 0 or step == config.train.steps:
            metrics = {
                "loss": sums.loss,
                "grad_norm": sums.grad_norm,
                "lr": self._learning_rate(next(iter(self.objective.turns)), self._began),
            }
            metrics |= sums.named
            metrics |= self._meter.metrics() | self._health.metrics(sums.position.images)
            self.tracker.write("train", sums.position, metrics)
            seconds = self._meter.seconds_per_step
            self._progress.update(step, sums.loss, config.data.batch_size / seconds, seconds)
            self._meter.restart()
            self.goodput.journal_now_and_then(sums.position)
        return sums.no_room

    def _save(self) -> None:
        with self.watchdog.during("saving"), self.goodput.during("save_stall_s"):
            meta = {"bad_steps": self.bad_steps.state(), **self._one.conditions.stated}
            self._saving.begin(self.position, self.players, self.objective.state(), **meta)

    def _save_before_the_end(self) -> None:
        """Some rank has no batch any more. What stood in for it was refused, so the run is where it was before."""
        self.position = self._reduced
        self.bad_steps.drop_pending()
        if self.position.step and self.position.step != self._saving.tried:
            if distributed.on_rank_0(self._saving.lacks_room, self.players):
                self._saving.skip(self.position)
            else:
                self._save()
        self._settle()

    def _settle(self) -> None:
        with self.watchdog.during("saving"), self.goodput.during("save_stall_s"):
            self._saving.settle()

    def _open_evaluation(self) -> None:
        """After the first step, which its imports and its reference would keep waiting, and no later, so that what
        could not be evaluated is told at once, and ends a run that has just begun.
        """
        with self.watchdog.during("start"), self.goodput.during("evaluation_s"):
            if self._evaluation is None:
                of_run = self.run, self.config, self.first_stage, self.objective, self.tracker
                self._evaluation = evaluation_of(*of_run, self._progress, self._stop_wanted)
            self._stopping = not self._evaluation.open(self.position) or self._stopping
        self._go_on()

    def _evaluation_due(self) -> bool:
        every, step, steps = self.config.eval.every, self.position.step, self.config.train.steps
        return bool(every and step) and (step == steps or step % every == 0)

    def _stop_wanted(self) -> bool:
        return self.stop.wanted(self._meter.seconds_per_step, self._saving.seconds)

    def _lacks_evaluation(self) -> bool:
        """Whether the one of where the run is was cut off, or has failed once: a second failure settles it."""
        evaluated, failed = (
            [line["step"] for line in self.tracker.history.counting(event)] for event in ("eval", "eval_failed")
        )
        return self.position.step not in evaluated and failed.count(self.position.step) < EVALUATION_TRIES

    def _evaluate(self) -> None:
        if self._evaluation is None:
            self._open_evaluation()
        self._owes_evaluation = self._stopping
        if not self._stopping:
            with self.watchdog.during("evaluation") as now, self.goodput.during("evaluation_s"):
                self._owes_evaluation = self._stopping = not self._evaluation.run(self.players, self.position)
                now.whole = self._evaluation.gave_numbers
        self._go_on()

    def _go_on(self) -> None:
        """With steps, after something else, whose time and memory are none of theirs."""
        distributed.keep_all_freed_memory()
        self._meter.restart()

    def _go_back(self) -> None:
        """To the newest whole checkpoint, and from there around the images that were refused last."""
        self.bad_steps.leave_out(self.position)
        self._settle()
        self.goodput.end_attempt(self.position)
        with self.watchdog.during("start"):
            left = self.position.step
            self.position = resume(
                self.players,
                self.objective,
                self.run,
                self.config,
                self.bad_steps,
                anew=True,
                data=self.manifest.hash,
                first_stage=self.first_stage,
            )
            self._saving.went_back(self.position)
            self._reduced = self.position
            why = f"{self.config.train.bad_steps} steps in a row were refused"
            self._progress.say(f"back from step {left} to {self.position.step}, to leave out images: {why}")
            self._begin({}, back_from=left, why=why)
        self.goodput.train()
        self._go_on()

    def _end(self) -> None:
        """Commit a checkpoint of where the steps ended."""
        self._settle()
        if self._saving.tried != self.position.step:
            self._save()
            self._settle()
        # Rank 0 commits, and has journaled by then: the launcher kills it once another rank has left.
        newest, problem = distributed.gather_objects((self._saving.newest, self._saving.problem))[0]
        if newest.step != self.position.step:
            raise SharedError(
                f"{self.run.path} ended at step {self.position.step}, but its newest checkpoint is of step "
                f"{newest.step}: {problem}; make room and start it again"
            )


def evaluation_of(*arguments):
    from dtrain.training.evaluation import Evaluation  # imports what a training without evaluations has no use for

    return Evaluation(*arguments)
