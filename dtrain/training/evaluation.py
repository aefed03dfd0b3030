"""The evaluation within training: the EMA gathered once into a plain module, samples on all ranks, a grid on rank 0."""

import time
from pathlib import Path

import torch

from dtrain import distributed, faults
from dtrain.config import Config
from dtrain.evaluation.evaluate import differences, evaluate, weights_name
from dtrain.evaluation.generate import GRID_IDS, Sampler, grid
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
    def __init__(self, run: RunDirectory, config: Config, process, tracker: Tracker, progress: TrainingProgress):
        self._run, self._config, self._process = run, config, process
        self._tracker, self._progress = tracker, progress
        self._reference = Reference(config, distributed.device())

    def run(self, engine: Engine, position: Position) -> None:
        """A collective. The gathered module is freed when it returns."""
        faults.at("eval", position.step)
        started = time.perf_counter()
        device, config, weights = distributed.device(), self._config, weights_name(self._config)
        model = engine.gather("fp32" if weights == "raw" else weights, allocate(config).to(device))
        sampler = Sampler.of(model, self._process, config, device)
        metrics, context = evaluate(sampler, config, self._reference)
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
