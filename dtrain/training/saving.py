"""When a checkpoint is begun, finished or given up; the bytes are the writer's business."""

import torch

from dtrain import __version__, distributed
from dtrain.checkpoint.writer import Writer
from dtrain.config import Config
from dtrain.run import Position, RunDirectory
from dtrain.tracking.tracker import Tracker
from dtrain.training.engine import Engine
from dtrain.training.progress import TrainingProgress
from dtrain.training.reduction import StepSums


class Saving:
    """One save in flight. Ranks report through the step's reduction and commit together."""

    def __init__(self, run: RunDirectory, config: Config, data: str, tracker: Tracker, progress: TrainingProgress):
        self._writer = Writer(run.checkpoints, distributed.rank(), distributed.world_size(), config.train.keep_last)
        self._config, self._data, self._tracker, self._progress = config, data, tracker, progress
        self._position: Position | None = None  # of the save in flight

    @property
    def written(self) -> bool:
        return self._writer.written

    @property
    def failed(self) -> bool:
        return self._writer.failure is not None

    def begin(self, position: Position, engine: Engine) -> None:
        """Copy this rank's pieces and write them in the background; waits first for a save still in flight."""
        self.settle()
        self._position = position
        meta = {
            "step": position.step,
            "images": position.images,
            "optimizer_steps": engine.optimizer_steps,
            "config": self._config.model_dump(mode="json"),
            "data": self._data,
            "versions": {"dtrain": __version__, "torch": torch.__version__},
        }
        self._writer.begin(position.step, engine.pieces(), engine.tensor_sizes(), meta)

    def heard(self, sums: StepSums) -> None:
        """What the reduction says of the save in flight, the same on every rank."""
        if self._position is not None and (sums.written or sums.failed):
            self._finish(sums.failed)

    def settle(self) -> None:
        """Wait, on every rank, for the save in flight and finish it. A collective."""
        if self._position is not None:
            self._writer.wait()
            self._finish(not all(distributed.gather_objects(self.written)))

    def _finish(self, failed: bool) -> None:
        position, self._position, failure = self._position, None, self._writer.failure
        if not failed:
            path = self._writer.commit()
            self._tracker.write("checkpoint", position, context={"path": path.name})
            return
        self._writer.abandon()
        message = f"the checkpoint of step {position.step} was not saved: {failure or 'another rank could not write'}"
        self._tracker.write("fault", position, context={"message": message})
        self._progress.say(message)
