"""Save while training goes on: copy the pieces, let a thread write them, commit when every rank has written.

    writer.begin(step, pieces, meta)        copies (this is all the loop waits for)
    writer.written / writer.failure         reported through the loop's own reduction; the thread never communicates
    writer.commit()                         on every rank once all have written: rank 0 makes the name complete

A checkpoint's name ends in `.partial` until everything below it is durable, so a name without it is complete.
"""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from dtrain import faults
from dtrain.checkpoint import format
from dtrain.checkpoint.directory import step_path

PACE = 4.0  # seconds of rest after a second of writing, while nobody waits for the checkpoint


class Writer:
    """Writes one rank's part of each checkpoint; one save in flight."""

    def __init__(self, directory: Path, rank: int, world_size: int):
        self.directory, self.rank, self.world_size = directory, rank, world_size
        self._hurry = threading.Event()
        self.step: int | None = None  # of the save in flight
        self.failure: str | None = None
        self._thread: threading.Thread | None = None
        self._layout: format.Layout | None = None
        self._image: torch.Tensor | None = None  # the file's bytes; kept, so that a later save pays no page faults
        self._tensors: dict[str, int] = {}
        self._meta: dict[str, Any] = {}
        self._summary = format.Summary()

    @torch.no_grad()
    def begin(self, step: int, pieces: list, tensors: dict[str, int], meta: dict[str, Any]) -> None:
        """Copy `pieces` (objects with name, start, values) and start writing. Returns when the copy is done."""
        assert self.step is None, "a save is in flight"
        self.step, self.failure, self._tensors, self._meta = step, None, tensors, meta
        wanted = format.layout((p.name, p.start, p.values.numel()) for p in pieces)
        if wanted != self._layout:
            self._layout = wanted
            self._image = torch.empty(wanted.size, dtype=torch.uint8)
            self._image[: len(wanted.header)] = torch.frombuffer(bytearray(wanted.header), dtype=torch.uint8)
        for slot, piece in zip(wanted.slots, pieces, strict=True):
            faults.at("save:stage", step)
            target = self._image[slot.offset : slot.offset + 4 * slot.length].view(torch.float32)
            target.copy_(piece.values, non_blocking=False)
        self._hurry.clear()
        self._thread = threading.Thread(target=self._write, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def partial(self) -> Path:
        return step_path(self.directory, self.step).with_suffix(".partial")

    def _write(self) -> None:
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            format.write_file(self.partial, self.rank, self._layout, memoryview(self._image.numpy()), self._rest)
            faults.at("save:written")
        except OSError as e:
            self.failure = f"cannot write {e.filename or self.partial}: {e.strerror}"
        except Exception as e:  # else a thread that died would pass for one that has written
            self.failure = f"cannot write {self.partial}: {type(e).__name__}: {e}"

    def _rest(self, seconds: float) -> None:
        """On CPUs the cores that write are those that train: a save in the background takes a fifth of one."""
        self._hurry.wait(PACE * seconds)

    @property
    def written(self) -> bool:
        """This rank's part is durable."""
        return self._thread is not None and not self._thread.is_alive() and self.failure is None

    def wait(self) -> None:
        """Until this rank's thread has finished, well or not; from now on it does not rest."""
        self._hurry.set()
        if self._thread is not None:
            self._thread.join()

    def commit(self) -> Path:
        """Every rank has written: rank 0 makes the checkpoint complete.

        Raises OSError or Damaged when it cannot; the save is then still to be abandoned.
        """
        faults.at("save:commit")
        partial, final = self.partial, step_path(self.directory, self.step)
        if self.rank == 0:
            format.write_manifest(partial, self.world_size, self._tensors, self._meta, self._summary)
            faults.at("save:manifest")
            replaced = final.with_suffix(".replaced.partial")
            if os.path.lexists(final):  # of an earlier attempt, and damaged, or it would have been resumed from
                os.rename(final, replaced)
                faults.at("save:replace")
            os.rename(partial, final)
            faults.at("save:committed")
            format.fsync_folder(self.directory)
            shutil.rmtree(replaced, ignore_errors=True)
        self.step = self._thread = None
        return final

    def abandon(self) -> None:
        """A rank could not write: give this save up; rank 0 removes what there is."""
        self.wait()
        if self.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        self.step = self._thread = self.failure = None
