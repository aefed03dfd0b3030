"""Before the first step: may this config go on in this run directory, and from which checkpoint."""

from dtrain import distributed
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.checkpoint.writer import complete, remove_partial
from dtrain.config import Config
from dtrain.data.manifest import Manifest
from dtrain.data.order import default_streams
from dtrain.errors import UserError
from dtrain.run import Position, RunDirectory
from dtrain.tracking.journal import read as read_journal
from dtrain.training.engine import Engine


def with_streams(config: Config, manifest: Manifest) -> Config:
    """The config with data.streams resolved for this data set. Raises UserError when there are more than samples."""
    streams = config.data.streams or default_streams(manifest.samples)
    if streams > manifest.samples:
        raise UserError(f"data.streams {streams} exceeds the {manifest.samples} samples of {manifest.path}")
    return config.model_copy(update={"data": config.data.model_copy(update={"streams": streams})})


def prepare(run: RunDirectory, config: Config, manifest: Manifest) -> dict[str, tuple]:
    """On rank 0: refuse another identity or data set, make the folders, clear what an interrupted save left.

    Returns the config keys that differ from the last start. Nothing is written before everything is checked.
    """
    changes = run.reconcile(config)
    attempts = [e for e in read_journal(run.journal_file) if e["event"] == "attempt"]
    if attempts and attempts[-1]["context"]["data"] != manifest.hash:
        raise UserError(
            f"{run.path} was trained on another data set than {manifest.path} (the manifests' hashes differ); "
            f"give this run a new run.name, or the old data"
        )
    run.create(config)
    run.outcome_file.unlink(missing_ok=True)
    remove_partial(run.checkpoints)
    return changes


def resume(engine: Engine, run: RunDirectory) -> Position:
    """Load the newest checkpoint that every rank can read whole; the beginning where there is none."""
    found = complete(run.checkpoints)
    for path in reversed(found):
        problem = None
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.read_into((p.name, p.start, p.values.numpy()) for p in engine.pieces(whole=True))
        except Damaged as e:
            problem = str(e)
        problems = [p for p in distributed.gather_objects(problem) if p]
        if not problems:
            engine.refresh(checkpoint.meta["optimizer_steps"])
            return Position(checkpoint.meta["step"], checkpoint.meta["images"])
        if distributed.rank() == 0:
            print(f"skipping a damaged checkpoint: {problems[0]}", flush=True)
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {run.checkpoints} is whole; move them away to start anew"
        )
    return Position()
