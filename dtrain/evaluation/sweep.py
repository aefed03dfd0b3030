"""Evaluate a run at every combination of checkpoints, weights and sampler settings; a table, a picture, the best one.

RUN/sweep.jsonl keeps one line a combination, a journal's "sweep" event under a key of all that its numbers depend on. A
sweep that is started again, or widened, computes only what is not there.
"""

import fcntl
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtrain import distributed
from dtrain.config import Config, Eval
from dtrain.errors import NotFinite, UserError
from dtrain.evaluation.combinations import Setting, combinations, configured
from dtrain.evaluation.evaluate import (
    evaluate,
    evaluations_of_a_rank,
    of_the_reference,
    sampling_settings,
    scratch_of,
)
from dtrain.evaluation.generate import OnProgress, quiet
from dtrain.evaluation.names import OF_STATISTICS
from dtrain.evaluation.opened import newest_step, open_generator, weights_name
from dtrain.evaluation.reference import Reference
from dtrain.run import RunDirectory
from dtrain.tracking.best import better
from dtrain.tracking.journal import combinations as combinations_there


@dataclass(frozen=True)
class Row:
    """One combination, or several that differ in their seed alone."""

    setting: Setting
    metrics: dict[str, float]  # means over seeds
    std: dict[str, float]  # over seeds, as of a sample; 0 for a single one


def sweep(
    run: RunDirectory,
    config: Config,
    axes: dict[str, list],
    on_progress: OnProgress = quiet,
    say: Callable[[str | None], None] = lambda line: None,
) -> list[dict]:
    """The lines of all combinations, in order. A collective; nothing is drawn for a line that is there.

    A combination whose samples are not finite is left out, and said. Raises NotFinite where all are.

    on_progress: called with this rank's evaluations of the network, of all combinations together.
    """
    settings = combinations(axes)
    configs = [configured(config, setting) for setting in settings]  # all of them, before the first is drawn
    device, path = distributed.device(), run.path / "sweep.jsonl"
    on_progress(0, 0, "reading the reference")
    reference = Reference.open(config, device, on_progress)
    say(reference.kept)
    say(reference.about)
    lines = distributed.on_rank_0(combinations_there, path)
    newest = None if axes.get("checkpoint") else newest_step(run)  # once: a training that goes on makes others
    evaluations = [evaluations_of_a_rank(at) for at in configs]
    found, taken, opened, failed = [], None, None, None
    for number, (setting, at) in enumerate(zip(settings, configs, strict=True)):
        weights = weights_name(at.eval)
        wanted = setting.get("checkpoint", newest), weights
        if wanted != taken:
            opened, taken = open_generator(run, at, device, wanted[0]), wanted
        key = _key(opened.checkpoint, at.eval, reference)
        scratch = scratch_of(run, at.eval, opened.checkpoint, reference)
        if key not in lines:
            about = f"combination {number + 1} of {len(settings)}: {shown(setting)}"
            before = sum(evaluations[:number])

            def of_all(done: int, of: int, what: str | None = None, about: str = about, before: int = before) -> None:
                if what is None:
                    on_progress(before + done, sum(evaluations), about)
                else:
                    on_progress(done, of, f"{about}, {what}")

            try:
                metrics, context = evaluate(opened.generator, at, reference, of_all, scratch)
            except NotFinite as e:  # of this combination, as of much guidance; others have their numbers
                say(f"{about} is left out: {e}")
                failed = e
                if distributed.rank() == 0:
                    scratch.remove()
                continue
            line = {
                "event": "sweep",
                "key": key,
                "setting": setting,
                "step": opened.step,
                "images": opened.images,
                "attempt": 0,
            }
            line |= {"metrics": metrics, "context": context}
            lines[key] = distributed.on_rank_0(append, path, line)
        if distributed.rank() == 0:
            scratch.remove()  # also what a job left that was killed after its line was written
        found.append(lines[key] | {"setting": setting})
    if failed is not None and not found:
        raise failed
    return found


def number_stored(run: RunDirectory) -> int:
    """How many results a sweep of this run would not compute again."""
    return len(combinations_there(run.path / "sweep.jsonl"))


def shown(setting: Setting) -> str:
    return ", ".join(f"{k} {v}" for k, v in setting.items())


def summary(lines: list[dict]) -> list[Row]:
    """Seeds taken together."""
    groups: dict[str, list[dict]] = {}
    for line in lines:
        setting = {k: v for k, v in line["setting"].items() if k != "seed"}
        groups.setdefault(json.dumps(setting), []).append(line["metrics"])
    rows = []
    for setting, metrics in groups.items():
        values = {name: np.array([m[name] for m in metrics]) for name in metrics[0]}
        std = {name: float(v.std(ddof=1)) if len(v) > 1 else 0.0 for name, v in values.items()}
        rows.append(Row(json.loads(setting), {name: float(v.mean()) for name, v in values.items()}, std))
    return rows


def best(rows: list[Row], name: str) -> Row:
    """By the lowest value of this name, such as `fd_pixels`, or the highest where more is better."""
    finite = [row for row in rows if math.isfinite(row.metrics[name])]
    return better(name)(finite or rows, key=lambda row: row.metrics[name])


def table(rows: list[Row]) -> str:
    """One line a setting, one column a metric."""
    axes, names = list(rows[0].setting), list(rows[0].metrics)
    seeds = any(any(row.std.values()) for row in rows)

    def value(row: Row, name: str) -> str:
        return f"{row.metrics[name]:.4f} ± {row.std[name]:.4f}" if seeds else f"{row.metrics[name]:.4f}"

    cells = [[*axes, *names]] + [
        [*(str(row.setting[a]) for a in axes), *(value(row, name) for name in names)] for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(c, widths, strict=True)) for c in cells)


def heat_map(rows: list[Row], name: str, path: Path) -> bool:
    """A picture of one metric over the last two axes that vary, a panel for each choice of the others; where averages'
    widths alone vary, its curve.

    False, and no picture, where nothing varies.
    """
    varying = [a for a in rows[0].setting if len({str(row.setting[a]) for row in rows}) > 1]
    if not varying:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if varying == ["ema"] and all(str(row.setting["ema"]).startswith("sigma_") for row in rows):
        figure, axis = pyplot.subplots(figsize=(5, 3.2))
        points = sorted((float(row.setting["ema"].removeprefix("sigma_")), row.metrics[name]) for row in rows)
        axis.plot([width for width, _ in points], [value for _, value in points], "o-")
        axis.set(xlabel="width σ_rel of the average", ylabel=name)
        figure.tight_layout()
        figure.savefig(path, dpi=100)
        pyplot.close(figure)
        return True
    *panel_axes, row_axis, column_axis = [None, *varying] if len(varying) == 1 else varying
    columns = list(dict.fromkeys(row.setting[column_axis] for row in rows))
    lines = list(dict.fromkeys(row.setting.get(row_axis) for row in rows))
    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        panels.setdefault(tuple(row.setting[a] for a in panel_axes), []).append(row)
    values = [row.metrics[name] for row in rows]
    figure, axes = pyplot.subplots(
        1, len(panels), squeeze=False, figsize=((1.5 + 0.9 * len(columns)) * len(panels), 1.6 + 0.5 * len(lines))
    )
    for axis, (choice, members) in zip(axes[0], panels.items(), strict=True):
        grid = np.full((len(lines), len(columns)), np.nan)
        for row in members:
            place = lines.index(row.setting.get(row_axis)), columns.index(row.setting[column_axis])
            grid[place] = row.metrics[name]
            axis.text(place[1], place[0], f"{row.metrics[name]:.4g}", ha="center", va="center", backgroundcolor="white")
        axis.imshow(grid, cmap="viridis_r", vmin=min(values), vmax=max(values), aspect="auto")
        axis.set_xticks(range(len(columns)), [str(c) for c in columns])
        axis.set_yticks(range(len(lines)), [str(v) for v in lines] if row_axis else [""])
        axis.set(xlabel=column_axis, ylabel=row_axis or "")
        axis.set_title(", ".join(f"{a} {v}" for a, v in zip(panel_axes, choice, strict=True)) or name)
    if panel_axes:
        figure.suptitle(name)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return True


def _key(checkpoint: str, e: Eval, reference: Reference) -> str:
    of = of_the_reference(e, reference)
    if of.get("bpd_clip") is False:  # what it was before there was the key, and unsaid
        del of["bpd_clip"]
    if reference.comparable or not OF_STATISTICS & set(e.metrics):  # else it is in the name of a distance
        of.pop("reference_resize", None)
    what = sampling_settings(checkpoint, e, reference) | {
        "n": e.num_samples,
        "metrics": sorted(e.metrics),
        "bootstrap": e.bootstrap,
        "extractor": reference.extractor.fingerprint,
        "reference": reference.hash,
        **of,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def append(path: Path, line: dict) -> dict:
    """Keep a line of JSON in a file of such, with the time; the line. Raises UserError where it cannot be written."""
    line = line | {"time": time.time()}
    try:
        with open(path, "a+b") as f:
            fcntl.lockf(f, fcntl.LOCK_EX)  # the tasks of a job array write at any time, from several machines
            f.seek(0, 2)
            torn = f.tell() and (f.seek(-1, 2), f.read(1))[1] != b"\n"
            f.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; make room there") from None
    return line
