"""Which evaluation is the best: by the key that the journal, MLflow and reports know a metric by."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dtrain.config.evaluation import HIGHER_IS_BETTER
from dtrain.tracking.history import History

# The size of a block, and how many latents are decoded together, change no more than the rounding. What the resizing of
# a reference matters to, a distance, is in its name, and evaluations of one reference were made before its context said
# it.
NOT_SETTINGS = ("artifact", "differs", "batch_size", "decode_batch", "reference_resize")


def higher_is_better(metric: str) -> bool:
    """metric: a journal's key, such as `precision_inception`. Distances and bits/dim are better lower."""
    return any(metric == name or metric.startswith(f"{name}_") for name in HIGHER_IS_BETTER)


def better(metric: str):
    """`max` or `min`, whichever chooses the best of this metric's values."""
    return max if higher_is_better(metric) else min


def best_step(evaluations: Sequence[dict[str, Any]], metric: str, steps: Iterable[int]) -> int | None:
    """The one of the given steps with the best value of `metric`; None where none has one.

    evaluations: the run's own, in order. Compared are those made as the newest with this metric was made: fewer samples
    are a greater distance.
    """
    lines = [line for line in evaluations if metric in line["metrics"]]
    alike = {line["step"]: line["metrics"][metric] for line in made_alike(lines, lines[-1], metric)} if lines else {}
    values = {step: alike[step] for step in steps if math.isfinite(alike.get(step, math.nan))}
    return better(metric)(values, key=values.get) if values else None


def training_evaluations(journal_file: Path) -> list[dict[str, Any]]:
    """The lines of the training's own evaluations, in order; those of jobs lie in files of their own."""
    return History.read(journal_file).counting("eval")


def made_alike(lines: list[dict[str, Any]], line: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """Those of the evaluations that have the metric and were made as `line` was."""
    return [other for other in lines if metric in other["metrics"] and settings_of(other) == settings_of(line)]


def settings_of(line: dict[str, Any]) -> dict[str, Any]:
    """What of an evaluation's context makes its numbers others; an older line's bound was not clipped, unsaid."""
    before = {"bpd_clip": False} if "bpd" in line["metrics"] else {}
    return before | {key: value for key, value in line["context"].items() if key not in NOT_SETTINGS}
