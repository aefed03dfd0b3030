"""The evaluation within training: the EMA gathered once into a plain module, samples on all ranks, a grid on rank 0."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dtrain import distributed, faults
from dtrain.checkpoint.frozen_base import allocate_whole
from dtrain.conditions.build import NOTHING, Said, taken
from dtrain.config import Config
from dtrain.errors import NotFinite, SharedError, SharedFailure, UserError
from dtrain.evaluation import floor
from dtrain.evaluation.control import HeldOutPictures
from dtrain.evaluation.evaluate import differences, evaluate
from dtrain.evaluation.generate import GRID_IDS, Generator, OnProgress
from dtrain.evaluation.grid import CaptionedGrid, grid
from dtrain.evaluation.likelihood import losses_by_level
from dtrain.evaluation.opened import generator_of, weights_name
from dtrain.evaluation.reference import Reference
from dtrain.evaluation.sample import prompts_in_turn
from dtrain.files import replacing
from dtrain.first_stage.pixels import FirstStage
from dtrain.objectives.objective import Objective
from dtrain.position import Position
from dtrain.run import RunDirectory
from dtrain.tracking.tracker import Tracker
from dtrain.training.players import Players
from dtrain.training.record.output import traceback_of
from dtrain.training.record.progress import TrainingProgress
from dtrain.training.tf32 import untimed_algorithms

GRID_ROWS = 8
LONGEST_TRACEBACK = 4000  # characters of its end, for the journal


class Evaluation:
    """Evaluates the run at its present step, each time that `run` is called. As it may take hours, it yields to a stop.

    One that fails costs its numbers and no step: the ranks agree on what one of them met (`distributed.agree`), rank 0
    writes it into the journal as "eval_failed" and says it, and the training goes on.

    stop_wanted: whether this rank has been asked to; one rank is enough for all.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        first_stage: FirstStage,
        objective: Objective,
        tracker: Tracker,
        progress: TrainingProgress,
        stop_wanted: Callable[[], bool],
    ):
        self._run, self._config, self._objective = run, config, objective
        self._first_stage = first_stage
        self._tracker, self._progress, self._stop_wanted = tracker, progress, stop_wanted
        self._reference: Reference | None = None
        self.gave_numbers = False  # of the last call of `run`

    def open(self, position: Position) -> bool:
        """Read what samples are compared with; False where it gave way. A collective.

        What the user can mend ends a run that has just begun. All else is said, and each evaluation tries it again.
        """
        try:
            return self._unless_stopped("reading the reference", partial(self._read, position))
        except (SharedError, SharedFailure) as e:
            if position.step <= 1 and not isinstance(e, (NotFinite, SharedFailure)):
                raise
            self._progress.say(f"what samples are compared with cannot be read, so evaluations will fail: {e}")
            return True

    def run(self, players: Players, position: Position) -> bool:
        """False where it gave way, and another start is to make up for it. A collective.

        The gathered module is freed when it returns.
        """
        self.gave_numbers = False
        try:
            with untimed_algorithms():
                self.gave_numbers = self._unless_stopped(
                    "evaluating", lambda on_progress: self._evaluate(players, position, on_progress)
                )
            return self.gave_numbers
        except (SharedError, SharedFailure) as e:
            self._failed(position, e)
            return True

    def _unless_stopped(self, what: str, work: Callable[[OnProgress], None]) -> bool:
        gave_way = False

        with self._progress.phase(what) as show:

            def on_progress(done: int, of: int, what: str | None = None) -> None:
                nonlocal gave_way
                show(done, of, what)
                if self._stop_wanted():
                    gave_way = True
                    raise UserError("gave way to a stop")  # which brings the other ranks here too

            try:
                work(on_progress)
            except (SharedError, SharedFailure):
                if not any(distributed.gather_objects(gave_way)):
                    raise
                return False
        return True

    def _read(self, position: Position, on_progress: OnProgress) -> None:
        self._reference = Reference.open(self._config, distributed.device(), on_progress)
        if self._reference.kept:
            self._progress.say(self._reference.kept)
        if self._reference.about and not self._config.eval.reference:  # of a named one the start has said it
            self._progress.say(self._reference.about)
        self._measure_floor(position, on_progress)

    def _measure_floor(self, position: Position, on_progress: OnProgress) -> None:
        """Journal the distance of the first stage's own reconstructions, unless the run's journal has it."""
        known = partial(self._tracker.history.counting, floor.EVENT)
        of = self._first_stage, self._config, self._reference
        if found := floor.measure(*of, known, distributed.device(), on_progress):
            self._tracker.write(floor.EVENT, position, *found)
            self._progress.say(str(found))

    def _failed(self, position: Position, error: SharedError | SharedFailure) -> None:
        """Write down and say that there are no numbers of this step, and why."""
        context = {"message": str(error), "ema": weights_name(self._config.eval), "n": self._config.eval.num_samples}
        if error.__cause__ is not None:
            lines = traceback_of(error.__cause__)
            context["traceback"] = lines[-LONGEST_TRACEBACK:]
            if distributed.rank() != 0:
                print(lines, end="", flush=True)  # into this rank's log: rank 0 has but the message
        self._tracker.write("eval_failed", position, context=context)
        last = position.step == self._config.train.steps
        then = f"repeat it with: dtrain evaluate {self._run.path}" if last else "the training goes on"
        self._progress.say(f"the evaluation of step {position.step} failed: {error}; {then}")

    def _evaluate(self, players: Players, position: Position, on_progress: OnProgress) -> None:
        faults.at("eval", position.step)
        if self._reference is None:
            self._read(position, on_progress)
        started = time.perf_counter()
        device, config, weights = distributed.device(), self._config, weights_name(self._config.eval)
        module = distributed.agree(allocate_whole, config, device)
        key = "fp32" if weights == "raw" else weights
        model, objective = players.gather(key, module), self._standing(players, key, device)
        generator = distributed.agree(generator_of, model, objective.process, config, device, self._first_stage)
        metrics, context = evaluate(generator, config, self._reference, on_progress)
        levels = {}
        # Held-out pictures have no noise of their own, as those of a training on pairs have.
        if config.objective.diffuses and objective.validates and not config.is_coupled:
            held_out = *self._reference.validation, config.eval.seed, self._reference.of_validation()
            levels = losses_by_level(generator, objective, *held_out)
        # Others wait for it, under an evaluation's limit of a hang and not a step's.
        distributed.on_rank_0(self._conclude, generator, position, started, metrics, levels, context)

    def _standing(self, players: Players, key: str, device: torch.device) -> Objective:
        """The objective with a process of these weights, where networks make it. A collective."""
        networks = {}
        for name in self._objective.of_process:
            with device:
                network = self._objective.networks[name]()
            networks[name] = players.gather(key, network, name).cpu().eval()  # walks ask for levels as numbers
        return self._objective.standing_on(networks)

    def _conclude(
        self, generator: Generator, position: Position, started: float, metrics, levels, context: dict
    ) -> None:
        """What rank 0 does with the numbers: a picture beside them, the journal, a line to read."""
        config, weights = self._config, weights_name(self._config.eval)
        if differs := differences(self._tracker.history.counting("eval"), config.eval, config.eval, context):
            context = context | {"differs": differs}
        name = f"samples/step-{position.step:08d}.png"
        try:
            draw_grid(generator, config, self._run.path / name, self._reference.captions, self._reference.pictures)
            context = context | {"artifact": name}
        except Exception as e:  # the numbers count more than the picture
            message = f"{name} was not drawn: {(e.strerror if isinstance(e, OSError) else None) or e}"
            self._tracker.write("fault", position, context={"message": message})
            self._progress.say(message)
        seconds = time.perf_counter() - started
        faults.at("eval:journal")
        self._tracker.write("eval", position, metrics | {"seconds": seconds}, context)
        if levels:
            self._tracker.write("validation", position, levels, {"ema": weights})
        shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        self._progress.say(f"step {position.step}: {shown}  ({context['n']} samples of {weights}, {seconds:.0f} s)")


def draw_grid(
    generator: Generator,
    config: Config,
    path: Path,
    captions: Said = NOTHING,
    pictures: HeldOutPictures | None = None,
) -> None:
    """The same seeds and labels at every step, so that the pictures show the training; a column a class.

    A model that is told in words gets `eval.prompts`, a column each, or else the first of the held-out captions, which
    stand below the pictures. A column of a model that pictures control has one of the held-out ones. Drawn in blocks of
    eval.batch_size, which the device has room for.
    """
    prompts = config.eval.prompts
    columns = min(config.model.num_classes, 10) or min(len(prompts), GRID_ROWS) or GRID_ROWS
    ids = torch.arange(GRID_ROWS * columns)
    labels = ids % max(1, min(config.model.num_classes, columns))
    said = {name: prompts_in_turn(prompts or held_out, len(ids)) for name, held_out in captions.items()}
    shown = pictures.of((ids % columns).tolist()) if pictures else {}
    blocks = zip(ids.split(config.eval.batch_size), labels.split(config.eval.batch_size), strict=True)
    drawn = []
    for of_block, own_labels in blocks:
        own = taken(said | shown, of_block.tolist())
        more = {"said": own} if own else {}
        drawn.append(generator.draw((GRID_IDS + of_block).tolist(), own_labels, config.eval, **more))
    images = torch.cat(drawn)
    if generator.reconstructs:  # each row below the row of its originals
        originals = generator.originals((GRID_IDS + ids).tolist())
        rows = [each.unflatten(0, (-1, columns)) for each in (originals, images)]
        images = torch.stack(rows, dim=1).flatten(0, 2)
    if said:
        below = CaptionedGrid(next(iter(said.values())), columns, *images.shape[2:])
        below.put(0, images.permute(0, 2, 3, 1).numpy())
        picture = below.picture()
    else:
        picture = grid(images, columns, scale=max(1, 32 // config.data.image_size))
    with replacing(path) as f:
        picture.save(f, "png")
