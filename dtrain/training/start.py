"""Before the first step: may this config go on in this run directory, and from which checkpoint."""

import contextlib
from functools import partial
from pathlib import Path

import torch

from dtrain import distributed, faults
from dtrain.checkpoint.directory import complete, remove_partial
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.checkpoint.snapshots import begun as averages_begun
from dtrain.conditions.build import build as build_conditions
from dtrain.config import Config, identity, with_earlier_values
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import UserError
from dtrain.first_stage.build import check as check_first_stage
from dtrain.first_stage.pixels import FirstStage
from dtrain.lock import RunLock
from dtrain.models.build import build
from dtrain.models.published import load_published
from dtrain.objectives.objective import Objective
from dtrain.position import Position
from dtrain.run import RunDirectory
from dtrain.terminal import say
from dtrain.tracking.tracker import Tracker
from dtrain.training.check import check_data, checkpoint_at, is_weight_file
from dtrain.training.identity import reconcile
from dtrain.training.players import Players
from dtrain.training.safety.bad_steps import BadSteps


def prepare(run: RunDirectory, lock: RunLock, config: Config, manifest: Manifest, tracker: Tracker) -> dict[str, tuple]:
    """On rank 0: take the run directory, refuse another identity or data set, clear what an interrupted save left.

    From here on `tracker` knows what the journal tells, since nobody else writes it any more. Returns the config keys
    that differ from the last start. Nothing of the run is written before all is checked.
    """
    try:
        return _prepare(run, lock, config, manifest, tracker)
    except OSError as e:
        place = e.filename or run.path
        raise UserError(f"cannot write {place}: {e.strerror}; make room, or choose another run.dir") from None


def _prepare(
    run: RunDirectory, lock: RunLock, config: Config, manifest: Manifest, tracker: Tracker
) -> dict[str, tuple]:
    run.make_folders()
    lock.acquire()
    try:
        changes = reconcile(run, config)
        tracker.read_history()
        check_data(run, manifest, tracker.history)
        _check_averages(run, config)
        run.save_config(config)
        run.outcome_file.unlink(missing_ok=True)
        run.stop_file.unlink(missing_ok=True)
        for folder in (run.checkpoints, run.averages):
            remove_partial(folder)
    except (UserError, OSError):
        lock.release()
        raise
    return changes


def _check_averages(run: RunDirectory, config: Config) -> None:
    """Raises UserError where a power-function average would begin in the middle of the run, unasked."""
    for path in reversed(complete(run.checkpoints)) if config.keeps_snapshots else ():
        with contextlib.suppress(Damaged):  # `resume` passes it over, too
            averages_begun(config, Checkpoint.open(path, all_files=False))
            return


def resume(
    players: Players,
    objective: Objective,
    run: RunDirectory,
    config: Config,
    bad_steps: BadSteps | None = None,
    anew: bool = False,
    data: str | None = None,
    first_stage: FirstStage | None = None,
) -> Position:
    """Load the newest checkpoint that every rank can read whole; where there is none, begin.

    anew: the players have been trained with since it was made. data: the manifest's hash, and first_stage: a checkpoint
    must have been trained with both.

    Raises UserError when there are checkpoints and none is whole, or when run.init_from cannot be loaded.
    """
    # A rank that lists the folder by itself may miss the last commit.
    found = distributed.on_rank_0(complete, run.checkpoints)
    for path in reversed(found):
        checkpoint, problem = _load_on_all_ranks(partial(_load, players, objective, config, data, first_stage), path)
        if checkpoint is not None:
            players.refresh(checkpoint.meta["optimizer_steps"])
            if bad_steps is not None:
                bad_steps.load_state(checkpoint.meta.get("bad_steps", {}))
            return Position(checkpoint.meta["step"], checkpoint.meta["images"])
        if distributed.rank() == 0:
            say(f"skipping a checkpoint that cannot be used: {problem}")
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {run.checkpoints} is whole and this run's own: {problem}; "
            "move them away to start anew"
        )
    if anew:
        players.reset()
        objective.reset()
        bad_steps.load_state({})
    if config.run.init_from:
        _begin_from(players, config)
    return Position()


def _load(
    players: Players,
    objective: Objective,
    config: Config,
    data: str | None,
    first_stage: FirstStage | None,
    checkpoint: Checkpoint,
) -> None:
    _check_state(checkpoint)
    _check_own(config, data, checkpoint)
    try:
        players.check_held(checkpoint.meta.get("held", {}))
        if first_stage is not None:
            check_first_stage(first_stage, checkpoint.meta.get("first_stage"))
        build_conditions(config).check(checkpoint.meta.get("text_encoders"))
    except UserError as e:
        raise UserError(f"{checkpoint.path} cannot be resumed from: {e}") from None
    begun = averages_begun(config, checkpoint)
    players.load(checkpoint)
    players.load_state(checkpoint.meta.get("players", {}))
    players.first.begun = begun
    state = objective.state()
    objective.load_state({n: torch.from_numpy(checkpoint.tensor(n)).view(v.shape) for n, v in state.items()})


def _check_state(checkpoint: Checkpoint) -> None:
    """Raises UserError for a checkpoint that does not tell how far it is, or what it says of bad steps."""
    try:
        if not {"step", "images", "optimizer_steps"} <= checkpoint.meta.keys():
            raise ValueError("how far it is")
        BadSteps.check(checkpoint.meta.get("bad_steps", {}))
    except ValueError as e:
        raise UserError(f"{checkpoint.path} cannot be resumed from: it does not tell {e}") from None


def _check_own(config: Config, data: str | None, checkpoint: Checkpoint) -> None:
    """Raises UserError for a checkpoint that another run has written, though it lies in this run's folder."""
    if not {"config", "data"} <= checkpoint.meta.keys():
        return  # written by a program of the user's: nothing tells whose it is
    try:
        theirs = identity(Config(**with_earlier_values(checkpoint.meta["config"])))
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{checkpoint.path} does not say by a config of this version which run wrote it") from None
    for key, ours in identity(config).items():
        if theirs.get(key) != ours and not (key == "data.streams" and ours is None):
            raise UserError(f"{checkpoint.path} is of another run: {key} is {theirs.get(key)!r} there, {ours!r} here")
    if data not in (None, checkpoint.meta["data"]):
        raise UserError(f"{checkpoint.path} is of another run: it was trained on other data, of another manifest")


def _begin_from(players: Players, config: Config) -> None:
    """The weights of another run, or of a file, into the players of a new run."""
    source, which = config.run.init_from, config.run.init_weights
    if is_weight_file(source):
        turned = config.diffusion.data_at_one
        players.set_weights(distributed.agree(load_published, build(config), source, which, turned))
    else:
        newest = distributed.on_rank_0(checkpoint_at, source)
        key = "ema_0" if which == "ema" else "fp32"
        checkpoint, problem = _load_on_all_ranks(partial(players.load_weights, key=key), newest)
        if checkpoint is None:
            raise UserError(f"run.init_from={source} cannot be loaded: {problem}")
    players.refresh(optimizer_steps=0)


def _load_on_all_ranks(load, path: Path) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint where `load` succeeded on every rank, else None and the first rank's problem."""
    problem, checkpoint = None, None
    try:
        checkpoint = Checkpoint.open(path, all_files=distributed.rank() == 0)
        faults.at("load")
        load(checkpoint)
        faults.at("load:done")
    except (Damaged, UserError) as e:
        problem = str(e)
    problems = [p for p in distributed.gather_objects(problem) if p]
    return (None, problems[0]) if problems else (checkpoint, None)
