"""What a run keeps of its power-function averages, so that averages of other widths can be made of them later.

    runs/<name>/averages/step-00000500/   a checkpoint of the averages alone: what stays when the checkpoint goes

A checkpoint that is still there is a snapshot, too. Imports no torch.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dtrain import faults
from dtrain.checkpoint import format
from dtrain.checkpoint.directory import complete, remove, step_of, step_path
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.run import RunDirectory

FROZEN = "fp32"  # key of parameters that are not trained, and so have no average

Wanted = Iterable[tuple[str, int, np.ndarray]]


def profiles_of(meta: dict[str, Any]) -> dict[str, float]:
    """Key → σ_rel of the power-function averages of a checkpoint, by the config that it was made with."""
    listed = meta.get("config", {}).get("ema", [])
    return {f"ema_{i}": profile["sigma_rel"] for i, profile in enumerate(listed) if "sigma_rel" in profile}


def begun(config: Config, checkpoint: Checkpoint) -> dict[str, int]:
    """Average → optimizer step that it began after, of those that a checkpoint has not from the first step on.

    Raises UserError where a profile is not in the checkpoint and train.ema_new does not let it begin there.
    """
    theirs, found = profiles_of(checkpoint.meta), {}
    earlier = checkpoint.meta.get("ema_begun", {})
    for number, profile in enumerate(config.ema):
        key = f"ema_{number}"
        if profile.sigma_rel is None:
            continue
        if theirs.get(key) == profile.sigma_rel:
            found |= {key: earlier[key]} if key in earlier else {}
        elif config.train.ema_new == "begin":
            found[key] = checkpoint.meta["optimizer_steps"]
        else:
            raise UserError(
                f"{checkpoint.path} has not the average ema.{number} ({profile}), which goes back to the first step; "
                "take the profiles of before, or say train.ema_new=begin to start it here"
            )
    return found


def retire(run: RunDirectory, config: Config, step: int) -> str | None:
    """Remove a checkpoint, and keep its averages where they are due; a line for the user where they are lost.

    Raises OSError; the checkpoint is then still there, or removed.
    """
    path, said = step_path(run.checkpoints, step), None
    if config.is_snapshot(step):
        try:
            keep_averages(path, run.averages)
        except Damaged as e:
            said = f"the averages of step {step} are lost: {e}"
        kept = complete(run.averages)
        for old in kept[: -config.train.keep_snapshots] if config.train.keep_snapshots else []:
            remove(old)
    remove(path)
    return said


def forget(directory: Path, after: int) -> None:
    """Remove the snapshots of later steps."""
    for path in complete(directory):
        if step_of(path) > after:
            remove(path)


def keep_averages(path: Path, directory: Path) -> None:
    """The power-function averages of a checkpoint, and what is frozen, as a checkpoint in `directory`.

    Raises OSError and Damaged.
    """
    checkpoint = Checkpoint.open(path)
    averages = profiles_of(checkpoint.meta).keys()
    wanted = [name for name in checkpoint.tensors if name.rpartition(":")[2] in averages] + frozen_of(checkpoint)
    tensors = {name: checkpoint.tensors[name] for name in wanted}
    write(step_path(directory, step_of(path)), tensors, checkpoint.meta, checkpoint.read_into)


def frozen_of(checkpoint: Checkpoint) -> list[str]:
    """The tensors of parameters that are not trained."""
    parts = [name.rpartition(":") for name in checkpoint.tensors]
    trained = {parameter for parameter, _, key in parts if key != FROZEN}
    return [f"{parameter}:{FROZEN}" for parameter, _, key in parts if key == FROZEN and parameter not in trained]


def write(final: Path, tensors: dict[str, int], meta: dict[str, Any], read_into: Callable[[Wanted], None]) -> None:
    """A checkpoint in one file, whose values are read when they are written. Raises OSError, and what `read_into` does.

    It takes memory for a block and what `read_into` takes for one.
    """
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    layout = format.layout((name, 0, size) for name, size in tensors.items())
    format.write_file(partial, 0, layout, _Image(layout, read_into), lambda seconds: None)
    format.write_manifest(partial, 1, tensors, meta, format.Summary())
    faults.at("save:averages")
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    format.fsync_folder(final.parent)


class _Image:
    """The bytes of a file, made when they are asked for."""

    def __init__(self, layout: format.Layout, read_into: Callable[[Wanted], None]):
        self._layout, self._read_into = layout, read_into

    def __getitem__(self, part: slice) -> memoryview:
        image = np.empty(part.stop - part.start, np.uint8)
        header = np.frombuffer(self._layout.header, np.uint8)[part]
        image[: len(header)] = header
        wanted = []
        for slot in self._layout.slots:  # blocks and slots begin at multiples of 4
            low, high = (min(max(at, slot.offset), slot.offset + 4 * slot.length) for at in (part.start, part.stop))
            if low < high:
                values = image[low - part.start : high - part.start].view(np.float32)
                wanted.append((slot.name, (low - slot.offset) // 4, values))
        self._read_into(wanted)
        return memoryview(image)
