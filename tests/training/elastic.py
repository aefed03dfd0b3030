"""Resuming one shape's checkpoint in another shape; used by tests and by the campaign over all pairs."""

import shutil
from pathlib import Path

import numpy as np

from dtrain.checkpoint.directory import complete
from dtrain.checkpoint.format import Checkpoint
from tests.digits import losses, tiny
from tests.ranks import run_ranks
from tests.training.players import build_player
from tests.training.runs import train

SAVED_AT = 10


def shape(stage: int, *more: str) -> list[str]:
    return [f"deepspeed.zero_stage={stage}", *more]


def write(digits: Path, folder: Path, overrides: list[str], world_size: int) -> Path:
    """A run of ten steps with its checkpoint; returns the folder that holds it."""
    config = tiny(digits, folder, *overrides, f"train.steps={SAVED_AT}")
    run_ranks(train, world_size, config)
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint.open(complete(folder / "tiny" / "checkpoints")[-1])
    return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def rewritten(config):
    """On a rank: load the newest checkpoint and write what was loaded as a checkpoint of step 99 of this shape."""
    from dtrain import distributed
    from dtrain.checkpoint.writer import Writer
    from dtrain.objectives.build import build
    from dtrain.run import RunDirectory
    from dtrain.training.players import Players
    from dtrain.training.start import resume

    run = RunDirectory(config.run.path)
    engine = build_player(config)
    resume(Players([engine]), build(config), run, config)
    writer = Writer(run.checkpoints, distributed.rank(), distributed.world_size())
    writer.begin(99, engine.pieces(), engine.tensor_sizes(), {"step": 99, "images": 0, "optimizer_steps": 0})
    writer.wait()
    distributed.barrier()
    if distributed.rank() == 0:
        writer.commit()
    return engine.optimizer_steps


def resume_elsewhere(
    digits: Path, written: Path, folder: Path, overrides: list[str], world_size: int, steps: int
) -> tuple[list[float], dict[str, np.ndarray]]:
    """(losses of all steps, the state right after loading) of a copy of the run, gone on with in this shape."""
    shutil.copytree(written, folder)
    config = tiny(digits, folder, *overrides, f"train.steps={steps}")
    assert run_ranks(rewritten, world_size, config) == [SAVED_AT] * world_size
    loaded = tensors(folder)
    shutil.rmtree(folder / "tiny" / "checkpoints" / "step-00000099")
    run_ranks(train, world_size, config)
    return losses(config), loaded
