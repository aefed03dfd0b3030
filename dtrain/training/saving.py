"""When a checkpoint is begun, finished or given up, and which old ones stay; the bytes are the writer's business."""

import shutil
import threading
import time

import torch

from dtrain import __version__, distributed, faults
from dtrain.checkpoint.directory import complete, manifest_hash, step_of, surplus
from dtrain.checkpoint.format import Damaged
from dtrain.checkpoint.snapshots import forget, retire
from dtrain.checkpoint.writer import Writer
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.position import Position
from dtrain.run import RunDirectory
from dtrain.tracking.best import best_step
from dtrain.tracking.tracker import Tracker
from dtrain.training.players import Players
from dtrain.training.record.progress import TrainingProgress
from dtrain.training.reduction import StepSums
from dtrain.training.zero_state import Piece

SPARE = 1.02  # of the free space a save wants: indexes, and others who write


class Saving:
    """One save in flight. Ranks report through the step's reduction and commit together."""

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        data: str,
        first_stage: dict,
        position: Position,
        tracker: Tracker,
        progress: TrainingProgress,
    ):
        """data: the manifest's hash. first_stage: what checkpoints say of it (`first_stage.build.statement`)."""
        self._run, self._config, self._data, self._first_stage = run, config, data, first_stage
        self._tracker, self._progress = tracker, progress
        self._writer = Writer(run.checkpoints, distributed.rank(), distributed.world_size())
        self._position: Position | None = None  # of the save in flight
        self._retiring: dict[int, threading.Thread] = {}  # step of an old checkpoint → who removes it
        self._since = 0.0
        self._needed = self._free = 0  # bytes, as rank 0 last found them
        self.tried = position.step  # where a save was last begun or given up, if not loaded; alike on all ranks
        self.newest = position  # of the newest complete checkpoint, as rank 0 knows it, the one that commits
        self.problem: str | None = None  # why the last save came to nothing, as this rank knows it
        self.seconds = 0.0  # from copy to commit, of the slowest save so far
        self._forget_later_averages()

    @property
    def written(self) -> bool:
        return self._writer.written

    @property
    def failed(self) -> bool:
        return self._writer.failure is not None

    def lacks_room(self, players: Players) -> bool:
        """Whether the disk is too full for a checkpoint. Asked of rank 0 before any rank writes; all get the answer."""
        self._needed = int(4 * sum(players.tensor_sizes().values()) * SPARE)
        try:
            self._free = shutil.disk_usage(self._run.checkpoints).free
        except OSError:
            return False  # the save itself will say what is wrong
        return self._free < self._needed

    def require_room(self, players: Players) -> None:
        """On rank 0, before the first step: raises UserError where the disk is too full for a single checkpoint."""
        if self.lacks_room(players):
            raise UserError(f"{self._shortage()}; make room, or choose another run.dir")

    def _shortage(self) -> str:
        free, needed = f"{self._free / 2**20:,.1f} MiB free", f"{self._needed / 2**20:,.1f} MiB"
        return f"{self._run.checkpoints} has {free}, and a checkpoint takes {needed}"

    def skip(self, position: Position) -> None:
        """Instead of `begin`, on every rank, where rank 0 lacks room."""
        self.settle()
        self.tried = position.step
        self._lost(position, self._shortage())

    def begin(self, position: Position, players: Players, more: dict[str, torch.Tensor], **meta) -> None:
        """Copy this rank's pieces and write them in the background; waits first for a save still in flight.

        more: tensors by name that every rank holds alike; rank 0 writes them. meta: plain data beside them.
        """
        self.settle()
        self._position, self.tried, self._since = position, position.step, time.perf_counter()
        meta |= {
            "step": position.step,
            "images": position.images,
            "optimizer_steps": players.optimizer_steps,
            **({"players": further} if (further := players.state()) else {}),
            **({"held": players.held} if players.held else {}),
            **({"ema_begun": begun} if (begun := players.first.begun) else {}),
            **({"first_stage": self._first_stage} if self._first_stage else {}),
            "config": self._config.model_dump(mode="json"),
            "data": self._data,
            "versions": {"dtrain": __version__, "torch": torch.__version__},
        }
        pieces = players.pieces()
        if distributed.rank() == 0:
            pieces += [Piece(name, 0, values.flatten()) for name, values in more.items()]
        sizes = players.tensor_sizes() | {name: values.numel() for name, values in more.items()}
        self._writer.begin(position.step, pieces, sizes, meta)

    def on_reduced(self, sums: StepSums) -> None:
        """What the reduction says of the save in flight, the same on every rank."""
        if self._position is not None and (sums.written or sums.failed):
            self._finish(sums.failed)

    def settle(self) -> None:
        """Wait, on every rank, for the save in flight and finish it. A collective."""
        if self._position is not None:
            self._writer.wait()
            self._finish(not all(distributed.gather_objects(self.written)))

    def went_back(self, position: Position) -> None:
        """The run goes on from the checkpoint at `position`, where it has one."""
        self.tried, self.newest, self.problem = position.step, position, None
        self._forget_later_averages()

    def _forget_later_averages(self) -> None:
        """Those of steps that the run goes through again."""
        if distributed.rank() == 0:
            forget(self._run.averages, self.newest.step)

    def _finish(self, failed: bool) -> None:
        position, self._position, failure = self._position, None, self._writer.failure
        if not failed:
            try:
                path = self._writer.commit()
            except (OSError, Damaged) as e:  # on rank 0, the only one that knows
                where = getattr(e, "filename", None) or self._run.checkpoints
                failed, failure = True, f"cannot write {where}: {e.strerror}" if isinstance(e, OSError) else str(e)
        if failed:
            self._writer.abandon()
            self._lost(position, failure or "another rank could not write")
            return
        faults.at("save:journal")
        self.newest, self.problem = position, None
        self.seconds = max(self.seconds, time.perf_counter() - self._since)
        if distributed.rank() == 0:
            context = {
                "path": path.name,
                "hash": manifest_hash(path),
                "ema": [f"ema_{i}: {profile}" for i, profile in enumerate(self._config.ema)],
            }
            self._tracker.write("checkpoint", position, {"seconds": self.seconds}, context)
            try:
                self._remove_surplus()
            except OSError as e:  # a file system that is slow to answer: the next save tries again
                self._progress.say(f"old checkpoints stay for now: {e.filename}: {e.strerror}")

    def _lost(self, position: Position, problem: str) -> None:
        self.problem = problem
        message = f"the checkpoint of step {position.step} was not saved: {problem}"
        self._tracker.write("fault", position, context={"message": message})
        self._progress.say(message)

    def _remove_surplus(self) -> None:
        """Old checkpoints go in a thread: a large one takes a while, and nobody waits for it."""
        train, directory = self._config.train, self._run.checkpoints
        # A later one was damaged when this attempt passed it over: it is nobody's newest, and counts for nothing.
        steps = [step for step in map(step_of, complete(directory)) if step <= self.newest.step]
        evaluations = self._tracker.history.counting("eval") if train.keep_best else []
        best = best_step(evaluations, train.keep_best, steps) if train.keep_best else None
        self._retiring = {step: thread for step, thread in self._retiring.items() if thread.is_alive()}
        for step in surplus(steps, train.keep_last, train.keep_every, best):
            if step not in self._retiring:
                thread = threading.Thread(target=self._retire, args=(step,), daemon=True)
                self._retiring[step] = thread
                thread.start()

    def _retire(self, step: int) -> None:
        try:
            if said := retire(self._run, self._config, step):
                self._progress.say(said)
        except OSError as e:
            self._progress.say(f"the checkpoint of step {step} stays for now: {e.filename}: {e.strerror}")
