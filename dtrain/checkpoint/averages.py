"""Averages of the weights of any width, made after the training (Karras et al. 2024, section 3 and appendix C).

A run with power-function profiles keeps snapshots of its averages (`snapshots`). An average of another width, at the
step of one of them, is their linear combination whose profile is nearest to the wanted one in the least-squares sense.
Nothing here imports torch: averages are combined piece by piece.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.checkpoint.directory import complete, manifest_hash, step_of
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.checkpoint.snapshots import Wanted, frozen_of, profiles_of, write
from dtrain.config import Config
from dtrain.config.averages import gamma_of
from dtrain.errors import UserError
from dtrain.run import RunDirectory

KEY = "average"  # of a combination, as `ema_0` is a checkpoint's
_CHUNK = 1 << 20  # elements combined at a time


@dataclass(frozen=True)
class Snapshot:
    """One average of one step."""

    checkpoint: Checkpoint
    key: str
    sigma_rel: float
    steps: int  # optimizer steps that it goes over


@dataclass(frozen=True)
class Combination:
    """An average made of snapshots. It is read as a checkpoint is, whose only average is KEY."""

    snapshots: tuple[Snapshot, ...]
    weights: np.ndarray  # float64, one a snapshot; they sum to 1
    newest: Checkpoint  # of the step that it is an average at

    @property
    def path(self) -> Path:
        return self.newest.path

    @property
    def meta(self) -> dict[str, Any]:
        return self.newest.meta

    @property
    def tensors(self) -> dict[str, int]:
        """Name → elements: averages under KEY, what is frozen as it is."""
        sizes, own = self.newest.tensors, profiles_of(self.meta).keys()
        parts = {name: name.rpartition(":") for name in sizes}
        found = {f"{parameter}:{KEY}": sizes[name] for name, (parameter, _, key) in parts.items() if key in own}
        return found | {name: sizes[name] for name in frozen_of(self.newest)}

    @property
    def hash(self) -> str:
        """A sha256 of all that its values depend on."""
        parts = [f"{manifest_hash(one.checkpoint.path)} {one.key}" for one in self.snapshots]
        return hashlib.sha256("\n".join([*parts, *map(repr, self.weights.tolist())]).encode()).hexdigest()

    def read_into(self, wanted: Wanted) -> None:
        """As `Checkpoint.read_into`; summed in float64 and rounded once."""
        averages, frozen = [], []
        for name, start, out in wanted:
            parameter, _, key = name.rpartition(":")
            if key != KEY:
                frozen.append((name, start, out))
                continue
            for at in range(0, len(out), _CHUNK):
                averages.append((parameter, start + at, out[at : at + _CHUNK]))
        self.newest.read_into(frozen)
        while averages:
            some, elements = [], 0
            while averages and elements < _CHUNK:
                some.append(averages.pop())
                elements += len(some[-1][2])
            self._combine(some)

    def _combine(self, wanted: Sequence[tuple[str, int, np.ndarray]]) -> None:
        sums = [np.zeros(len(out)) for _, _, out in wanted]
        values = [np.empty(len(out), np.float32) for _, _, out in wanted]
        for one, weight in zip(self.snapshots, self.weights.tolist(), strict=True):
            places = zip(wanted, values, strict=True)
            one.checkpoint.read_into((f"{parameter}:{one.key}", start, out) for (parameter, start, _), out in places)
            for total, found in zip(sums, values, strict=True):
                total += weight * found
        for (_, _, out), total in zip(wanted, sums, strict=True):
            out[:] = total


def combination(run: RunDirectory, config: Config, sigma_rel: float, step: int | None = None) -> Combination:
    """The average of width `sigma_rel` at `step`, by default the newest one that has a snapshot.

    Of the snapshots those count that are due by the config, and that of `step` itself: what it gives does not depend on
    which further checkpoints are there. Raises UserError.
    """
    if not config.keeps_snapshots:
        raise UserError(
            f"{run.path} has no power-function average: an average of sigma_rel {sigma_rel} is made of two, such as "
            "ema [{sigma_rel: 0.05}, {sigma_rel: 0.1}]"
        )
    places = {step_of(path): path for folder in (run.averages, run.checkpoints) for path in complete(folder)}
    if not places:
        raise UserError(f"{run.path} has no complete checkpoint yet")
    at = max(places) if step is None else step
    if at not in places:
        raise UserError(f"{run.path} has no snapshot of step {at}; there are: {', '.join(map(str, sorted(places)))}")
    snapshots, newest = [], None
    try:
        for of in sorted(s for s in places if s == at or (s < at and config.is_snapshot(s))):
            newest = Checkpoint.open(places[of])
            snapshots += _snapshots(newest)
    except Damaged as e:
        raise UserError(f"the snapshot is damaged: {e}") from None
    steps = np.array([one.steps for one in snapshots], np.float64)
    widths = np.array([gamma_of(one.sigma_rel) for one in snapshots])
    weights = combined(steps, widths, float(newest.meta["optimizer_steps"]), gamma_of(sigma_rel))
    return Combination(tuple(snapshots), weights, newest)


def _snapshots(checkpoint: Checkpoint) -> list[Snapshot]:
    found, late = profiles_of(checkpoint.meta), checkpoint.meta.get("ema_begun", {})
    for key in found:
        if key in late:
            number = key.removeprefix("ema_")
            raise UserError(
                f"{checkpoint.path}: ema.{number} began after step {late[key]:,} (train.ema_new=begin), and an average "
                "of another width is made of such as go back to the first step"
            )
    return [Snapshot(checkpoint, key, sigma, checkpoint.meta["optimizer_steps"]) for key, sigma in found.items()]


def combined(steps: np.ndarray, gammas: np.ndarray, at: float, gamma: float) -> np.ndarray:
    """What each snapshot counts, float64 (n,): the least-squares fit of its profile to that of `gamma` at step `at`.

    steps, gammas: (n,), of the snapshots. Divided by their sum, so that they average. Karras et al. 2024, algorithm 3.
    """
    gram = _products(steps[:, None], gammas[:, None], steps[None], gammas[None])
    weights = np.linalg.lstsq(gram, _products(steps, gammas, at, gamma), rcond=None)[0]
    return weights / weights.sum()


def _products(s, b, t, c) -> np.ndarray:
    """∫ p q of the profiles p ∝ τ^b up to step s and q ∝ τ^c up to step t, elementwise."""
    rising = np.exp(np.where(s < t, c, -b) * np.log(s / t))
    return (b + 1) * (c + 1) * rising / ((b + c + 1) * np.maximum(s, t))


def reconstruct(run: RunDirectory, sigma_rel: float, step: int | None, out: Path) -> str:
    """Write an average of any width as a checkpoint that holds it as weights; a line that says what.

    run.init_from takes it. Raises UserError, also where `out` is there already.
    """
    found = combination(run, run.config(), sigma_rel, step)
    if out.exists():
        raise UserError(f"--out {out} is there already; name a new folder")
    names = {name.replace(f":{KEY}", ":fp32"): name for name in found.tensors}
    tensors = {own: found.tensors[name] for own, name in names.items()}
    meta = {key: value for key, value in found.meta.items() if key not in ("players", "bad_steps", "ema_begun")}
    try:
        write(
            *(out, tensors, meta | {"sigma_rel": sigma_rel}),
            lambda wanted: found.read_into((names[own], start, values) for own, start, values in wanted),
        )
    except OSError as e:
        raise UserError(f"cannot write --out {out}: {e.strerror}") from None
    except Damaged as e:
        raise UserError(f"a snapshot is damaged: {e}") from None
    steps = sorted({one.steps for one in found.snapshots})
    made = f"{len(found.snapshots)} snapshots from step {steps[0]:,} on"
    at = f"sigma_rel {sigma_rel} at step {found.meta['step']}"
    return f"{out}: the average of {at}, of {made}; run.init_from takes it"
