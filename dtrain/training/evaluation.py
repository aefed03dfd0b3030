"""The evaluation within training: the EMA gathered once into a plain module, samples on all ranks, a grid on rank 0."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from dtrain import distributed, faults
from dtrain.config import Config
from dtrain.errors import SharedError, UserError
from dtrain.evaluation.evaluate import differences, evaluate, weights_name
from dtrain.evaluation.generate import GRID_IDS, OnProgress, Sampler, grid
from dtrain.evaluation.likelihood import losses_by_level
from dtrain.evaluation.reference import Reference
from dtrain.files import replacing
from dtrain.models.build import allocate
from dtrain.run import Position, RunDirectory
from dtrain.tracking.tracker import Tracker
from dtrain.training.engine import Engine
from dtrain.training.progress import TrainingProgress

GRID_ROWS = 8


class Evaluation:
    """Evaluates the run at its present step, each time that `run` is called. As it may take hours, it yields to a stop.

    stop_wanted: whether this rank has been asked to; one rank's word is enough for all.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        process,
        tracker: Tracker,
        progress: TrainingProgress,
        stop_wanted: Callable[[], bool],
    ):
        self._run, self._config, self._process = run, config, process
        self._tracker, self._progress, self._stop_wanted = tracker, progress, stop_wanted
        self._reference: Reference | None = None

    def open(self) -> bool:
        """Read what samples are compared with, where that is not done; False where it gave way. A collective."""
        if self._reference is None:
            self._unless_stopped("reading the reference", self._read)
        return self._reference is not None

    def run(self, engine: Engine, position: Position) -> bool:
        """False where it gave way, and another start is to make up for it. A collective.

        The gathered module is freed when it returns.
        """
        return self._unless_stopped("evaluating", lambda on_progress: self._evaluate(engine, position, on_progress))

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
            except SharedError:
                if not any(distributed.gather_objects(gave_way)):
                    raise
                return False
        return True

    def _read(self, on_progress: OnProgress) -> None:
        self._reference = Reference(self._config, distributed.device(), on_progress)
        if self._reference.kept:
            self._progress.say(self._reference.kept)

    def _evaluate(self, engine: Engine, position: Position, on_progress: OnProgress) -> None:
        faults.at("eval", position.step)
        started = time.perf_counter()
        device, config, weights = distributed.device(), self._config, weights_name(self._config)
        model = engine.gather("fp32" if weights == "raw" else weights, allocate(config).to(device))
        sampler = Sampler.of(model, self._process, config, device)
        metrics, context = evaluate(sampler, config, self._reference, on_progress)
        levels = losses_by_level(sampler, *self._reference.validation, config.eval.seed)
        if distributed.rank() == 0:
            self._conclude(sampler, position, started, metrics, levels, context)
        distributed.barrier()  # under an evaluation's limit of a hang, not a step's

    def _conclude(self, sampler: Sampler, position: Position, started: float, metrics, levels, context: dict) -> None:
        """What rank 0 does with the numbers: a picture beside them, the journal, a line to read."""
        config, weights = self._config, weights_name(self._config)
        if differs := differences(self._run, config, config, context):
            context = context | {"differs": differs}
        name = f"samples/step-{position.step:08d}.png"
        try:
            draw_grid(sampler, config, self._run.path / name)
            context = context | {"artifact": name}
        except OSError as e:  # the numbers count more than the picture
            self._progress.say(f"{name} cannot be written: {e.strerror}")
        seconds = time.perf_counter() - started
        faults.at("eval:journal")
        self._tracker.write("eval", position, metrics | {"seconds": seconds}, context)
        self._tracker.write("validation", position, levels, {"ema": weights})
        shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        self._progress.say(f"step {position.step}: {shown}  ({context['n']} samples of {weights}, {seconds:.0f} s)")


def draw_grid(sampler: Sampler, config: Config, path: Path) -> None:
    """The same seeds and labels at every step, so that the pictures show the training; a column a class.

    Drawn in blocks of eval.batch_size, which the device has room for.
    """
    columns = min(config.model.num_classes, 10) or GRID_ROWS
    numbers = torch.arange(GRID_ROWS * columns)
    labels = numbers % max(1, min(config.model.num_classes, columns))
    blocks = zip(numbers.split(config.eval.batch_size), labels.split(config.eval.batch_size), strict=True)
    images = [sampler.draw((GRID_IDS + ids).tolist(), some, config.eval) for ids, some in blocks]
    picture = grid(torch.cat(images), columns, scale=max(1, 32 // config.data.image_size))
    with replacing(path) as f:
        picture.save(f, "png")
