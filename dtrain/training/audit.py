"""Was each sample used as often as the order says? Replays the order for what the journal says was trained.

A run's images are those between where it began and its last journaled step, but for those of steps that were refused
and those that it went back to leave out. Attempts that went through steps again after a stop count once: only the last
attempt to take a step is part of the run, as in the journal's own rule.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from dtrain.data.order.mixture import Mixture, of_run
from dtrain.data.order.skipped import NOTHING, Skipped
from dtrain.data.shards.manifest import Manifest, load_all
from dtrain.errors import UserError
from dtrain.files import beside
from dtrain.run import RunDirectory
from dtrain.tracking.journal import OTHER_RANKS, events, valid

_PIECE = 1 << 20  # images replayed at a time


@dataclass(frozen=True)
class Audit:
    """problems: what contradicts the order, one line each; empty where the run is proven right."""

    lines: list[str]
    problems: list[str]

    def __str__(self) -> str:
        verdict = "denied" if self.problems else "proven: each sample was used as often as the order says"
        return "\n".join([*self.lines, *self.problems, verdict])


def audit(run: RunDirectory) -> Audit:
    """Replay a run. Raises UserError where there is nothing to replay, or the data set is another one."""
    config = run.config()
    manifest = load_all(config.data)
    lines = events(run.journal_file)
    attempts = [line for line in lines if line["event"] == "attempt"]
    if not attempts:
        raise UserError(f"{run.path} has no attempt in its journal; there is nothing to audit")
    problems = [
        f"attempt {a['attempt']} was trained on another data set ({a['context'].get('data', '')[:12]}…)"
        for a in attempts
        if a["context"].get("data") != manifest.hash
    ]
    trained = [line for line in valid(lines) if line["event"] in ("attempt", "train", "checkpoint")]
    skipped = attempts[-1]["context"].get("skipped", [])
    left_out = Skipped([*skipped, *_refused(lines)])
    problems += _gaps(attempts, trained, left_out)
    images = max(line["images"] for line in trained)
    mixture = of_run(config.data, config.run.seed, manifest)
    sets = (manifest, *manifest.mixed)
    names = ["main", *(s.name for s in config.data.mix)]
    uses = replay(mixture, sets, images, left_out)
    for s, (name, order) in enumerate(zip(names, mixture.orders, strict=True)):
        passed, kept = mixture.counts(images)[s], left_out.between(0, images)
        taken = sum(mixture.counts(last)[s] - mixture.counts(first)[s] for first, last in kept)
        epoch = order.streams * order.stream_length
        problems += [f"{name}: {p}" for p in _contradictions(uses[s], passed, taken, epoch)]
    replaced = _replaced(run, names, uses)
    problems += replaced[1]
    shown = [f"{run.path}: {images:,} images in {len(attempts)} attempts"]
    for name, use in zip(names, uses, strict=True):
        shown.append(f"{name}: {len(use):,} samples, each used {use.min():,} to {use.max():,} times")
    if away := images - sum(last - first for first, last in left_out.between(0, images)):
        shown.append(f"{away:,} images left out, of steps that were refused")
    return Audit([*shown, f"{replaced[0]:,} replaced"], problems)


def replay(mixture: Mixture, sets: tuple[Manifest, ...], images: int, left_out: Skipped = NOTHING) -> list[np.ndarray]:
    """How often images 0..images of the run are each sample: (N,) int64 of each source. Memory: one count a sample."""
    uses = [np.zeros(one.samples, dtype=np.int64) for one in sets]
    for begin in range(0, images, _PIECE):
        for first, last in left_out.between(begin, min(begin + _PIECE, images)):
            source, sample = mixture.samples(np.arange(first, last))
            for s, use in enumerate(uses):
                use += np.bincount(sample[source == s], minlength=len(use))
    return uses


def _contradictions(use: np.ndarray, passed: int, taken: int, epoch: int) -> list[str]:
    """What e whole epochs and a part of one deny: no sample comes more than e + 1 times, and an epoch leaves few out.

    passed: images of the order gone through; taken: those of them that were trained on.
    """
    epochs, rest = divmod(passed, epoch)
    left_out = len(use) - epoch
    found = []
    if use.sum() != taken:
        found.append(f"{use.sum():,} uses of {taken:,} images")
    if use.max() > epochs + (rest > 0):
        found.append(f"sample {use.argmax():,} used {use.max():,} times in {epochs:,} epochs and a part")
    missed = int(np.maximum(epochs - use, 0).sum())
    allowed = epochs * left_out + passed - taken
    if missed > allowed:
        found.append(f"{missed:,} uses missing, {allowed:,} can be left out")
    return found


def _refused(lines: list[dict]) -> list[list[int]]:
    """Ranges of images in steps that were refused, and that no later attempt came to again."""
    limit: dict[int, float] = {}
    lowest = math.inf
    for begin in sorted((line for line in lines if line["event"] == "attempt"), key=lambda b: -b["attempt"]):
        limit[begin["attempt"]] = lowest
        lowest = min(lowest, begin["images"])
    refused = [line for line in lines if line["event"] == "fault" and "refused" in line["context"]]
    return [r for line in refused for r in line["context"]["refused"] if r[1] <= limit.get(line["attempt"], math.inf)]


def _gaps(attempts: list[dict], trained: list[dict], left_out: Skipped) -> list[str]:
    """Images must follow steps: a resume begins at an image count the run had, and none goes backwards or too far."""
    found = []
    at = {line["step"]: line["images"] for line in trained if line["event"] != "attempt"}
    for begin in attempts:
        if at.get(begin["step"], begin["images"]) != begin["images"]:
            found.append(
                f"attempt {begin['attempt']} goes on at image {begin['images']:,}, but step {begin['step']:,} "
                f"ended at {at[begin['step']]:,}"
            )
    ordered = sorted(trained, key=lambda line: line["step"])
    for before, after in itertools.pairwise(ordered):
        if after["images"] < before["images"]:
            found.append(f"step {after['step']:,} has fewer images than step {before['step']:,}")
    return found or _jumps(attempts, trained, left_out)


def _jumps(attempts: list[dict], trained: list[dict], left_out: Skipped) -> list[str]:
    """Within an attempt every step has one batch of images, none of which is left out."""
    found = []
    sizes = {a["attempt"]: a["context"]["batch_size"] for a in attempts if "batch_size" in a["context"]}
    ordered = sorted(trained, key=lambda line: (line["attempt"], line["step"]))
    for before, after in itertools.pairwise(ordered):
        if before["attempt"] != after["attempt"] or after["attempt"] not in sizes:
            continue
        images = sum(last - first for first, last in left_out.between(before["images"], after["images"]))
        steps = after["step"] - before["step"]
        if images != steps * sizes[after["attempt"]]:
            found.append(
                f"{images:,} images were trained on between steps {before['step']:,} and {after['step']:,}, "
                f"not {steps:,} times {sizes[after['attempt']]:,}"
            )
    return found


def _replaced(run: RunDirectory, names: list[str], uses: list[np.ndarray]) -> tuple[int, list[str]]:
    """Bad samples that the journals of all ranks name: their number, and those the order did not ask for."""
    journals = [run.journal_file, *beside(run.journal_file, OTHER_RANKS)]
    begins = [line for line in events(run.journal_file) if line["event"] == "attempt"]
    lines = valid([*begins, *(line for p in journals for line in events(p) if line["event"] == "bad_sample")])
    contexts = [line["context"] for line in lines if line["event"] == "bad_sample"]
    found = {one["k"]: one for one in contexts if {"k", "source", "sample"} <= one.keys()}
    wrong = [
        f"image {k:,}: {one['source']}'s sample {one['sample']:,} was replaced, which the order did not ask for"
        for k, one in sorted(found.items())
        if one["source"] not in names or not uses[names.index(one["source"])][one["sample"] :][:1].any()
    ]
    return len(found), wrong
