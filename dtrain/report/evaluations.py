"""Evaluations as curves: one line for each run, metric, weights, number of samples and way of sampling.

A line never joins evaluations that differ in any of these: a Fréchet distance of fewer samples is another, larger one.
"""

import json
import math
from dataclasses import dataclass

from dtrain.config import guidance
from dtrain.evaluation.names import FRECHET, PARTS, reconstructed
from dtrain.report.chart import Chart, Point, Series, line_of
from dtrain.report.markup import details, escaped, plural
from dtrain.report.markup import table as make_table
from dtrain.report.numbers import count, short
from dtrain.report.runs import Line, Run
from dtrain.tracking.best import NOT_SETTINGS, better, higher_is_better, settings_of

# What belongs to a value of a metric and is drawn as its interval.
SPREADS = {"_std": "± one standard deviation over subsets", "_error": "± the error of the fit"}
NOT_METRICS = ("seconds", *(f"{metric}_{part}" for metric, parts in PARTS.items() for part in parts))
HELD_OUT = "_held_out"  # what the held-out images themselves have of it: a level line
MOST_NUMBERS = 8  # of one metric, where no line has several points
LONGEST = 200  # characters of a setting
HASHES = ("extractor", "reference")
BESIDE = ("ema", "n", "features", *HASHES)  # said of every line, or in the metric's name
DESCRIBED = ("sampler", "steps", "eta", "guidance", "seed")  # by `described`, or as so many seeds


@dataclass(frozen=True)
class Curve:
    run: Run
    number: int  # of the run
    metric: str
    context: dict  # of all its evaluations
    lines: list[Line]  # by images

    @property
    def best(self) -> Line:
        return better(self.metric)(self.lines, key=lambda line: line["metrics"][self.metric])


def metrics_of(line: Line) -> list[str]:
    """The metrics of an evaluation without their intervals."""
    names = line["metrics"]
    belongs = {f"{name}{suffix}" for name in names for suffix in ("_low", "_high", HELD_OUT, *SPREADS)}
    return [name for name in names if name not in belongs and name not in NOT_METRICS]


def is_distance(metric: str) -> bool:
    """Whether it is a Fréchet distance: what runs are compared by."""
    name = metric.removeprefix("r")  # of reconstructions, where the run is of an autoencoder
    return name in FRECHET.values() or (name.startswith("fd_") and not name.startswith("fd_infinity"))


def curves(runs: list[Run]) -> dict[str, list[Curve]]:
    """By metric, Fréchet distances first."""
    groups: dict[tuple[str, int, str], dict[tuple, Line]] = {}
    for number, run in enumerate(runs):
        for line in run.of("eval"):
            context = json.dumps(settings_of(line), sort_keys=True)
            for metric in metrics_of(line):
                if math.isfinite(line["metrics"][metric]):
                    group = groups.setdefault((metric, number, context), {})
                    group[line["images"]] = line  # repeated: the last one counts
    found: dict[str, list[Curve]] = {}
    for (metric, number, context), lines in groups.items():
        ordered = [lines[images] for images in sorted(lines)]
        found.setdefault(metric, []).append(Curve(runs[number], number, metric, json.loads(context), ordered))
    return dict(sorted(found.items(), key=lambda item: (not is_distance(item[0]), item[0])))


def interval(line: Line, metric: str) -> tuple[float, float] | tuple[None, None]:
    """The ends of what is known of the value's spread."""
    found = line["metrics"]
    ends = [(found.get(f"{metric}_low", math.nan), found.get(f"{metric}_high", math.nan))]
    ends += [
        (found[metric] - s, found[metric] + s) for suffix in SPREADS if (s := found.get(metric + suffix)) is not None
    ]
    return next(((low, high) for low, high in ends if math.isfinite(low + high)), (None, None))


def charts(runs: list[Run]) -> list[Chart]:
    """One chart a metric. Where some line has several points, single evaluations stay in the table."""
    found = []
    for metric, all_curves in curves(runs).items():
        own_first = sorted(all_curves, key=lambda c: not is_own(c.lines[0]["context"], c.run))
        drawn = [c for c in all_curves if len(c.lines) > 1] or own_first[: max(MOST_NUMBERS, len(runs))]
        names = _names(drawn, len(runs) > 1)
        # Runs by colour and what else differs by dashes; within one run, lines by colour.
        series, within = [], {}
        for place, (curve, name) in enumerate(zip(drawn, names, strict=True)):
            order = within[curve.number] = within.get(curve.number, -1) + 1
            colour, dash = line_of(curve.number) if len(runs) > 1 else line_of(place)
            dash += order if len(runs) > 1 else 0
            points = [_point(line, metric) for line in curve.lines]
            series.append(Series(name, points, colour, dash, dots=True))
        if is_distance(metric):
            series += _floors(drawn, metric, len(runs) > 1)
        series += _of_held_out(drawn, metric, len(runs) > 1)
        apart = len(all_curves) - len(drawn)
        notes = [_spread_note(drawn, metric), _bound_note(drawn) if metric == "bpd" else ""]
        notes += [f"{apart} single evaluations with other settings are in the table below." if apart else ""]
        which = "higher" if higher_is_better(metric) else "lower"
        found.append(Chart(metric, series, y_name=f"{which} is better", note=" ".join(filter(None, notes)), wide=True))
    return found


def _floors(drawn: list[Curve], metric: str, several_runs: bool) -> list[Series]:
    """What the reconstructions of these runs' first stages alone are at: a level line through the chart for each."""
    images = [line["images"] for curve in drawn for line in curve.lines]
    ends = sorted({min(images), max(images)}) if any(len(curve.lines) > 1 for curve in drawn) else images[:1]
    found: dict[tuple, Series] = {}
    for curve in drawn:
        for line in curve.run.of("floor"):
            value, n = line["metrics"].get(reconstructed(metric), math.nan), _size(line["context"])
            alike = all(line["context"].get(key) == curve.context.get(key) for key in ("reference", "first_stage"))
            if alike and math.isfinite(value):
                name = f"first stage alone ({reconstructed(metric)}) · N {n:,}"
                colour, _ = line_of(curve.number if several_runs else len(drawn))
                found[curve.number, n] = Series(
                    f"{curve.run.name} · {name}" if several_runs else name, [Point(x, value) for x in ends], colour, 3
                )
    return list(found.values())


def _of_held_out(drawn: list[Curve], metric: str, several_runs: bool) -> list[Series]:
    """What the held-out images have of a metric that tells it, beside each run's curves."""
    found: dict[int, Series] = {}
    for curve in drawn:
        points = [
            Point(at["images"], v) for at in curve.lines if (v := at["metrics"].get(metric + HELD_OUT)) is not None
        ]
        if points:
            name = f"{curve.run.name} · held-out images" if several_runs else "held-out images"
            colour, _ = line_of(curve.number if several_runs else len(drawn))
            found[curve.number] = Series(name, points, colour, 3)
    return list(found.values())


@dataclass(frozen=True)
class Best:
    """The lowest of a Fréchet distance among a run's evaluations under one setting."""

    metric: str
    setting: str  # what it was of
    line: Line
    own: bool  # under the settings of the run's config

    @property
    def value(self) -> float:
        return self.line["metrics"][self.metric]


def best_of(run: Run) -> list[Best]:
    """One for each metric and setting, the run's own settings first, then more samples before fewer.

    Evaluations that differ by the seed alone are of one setting, and it is said that one of several is shown.
    """
    found = []
    for metric, all_curves in curves([run]).items():
        if not is_distance(metric):
            continue
        settings: dict[str, list[Curve]] = {}
        for curve in all_curves:
            setting = {k: v for k, v in curve.context.items() if k != "seed"}
            settings.setdefault(json.dumps(setting, sort_keys=True), []).append(curve)
        varying = _varying([some[0].context for some in settings.values()])
        for some in settings.values():
            line = min((curve.best for curve in some), key=lambda line: line["metrics"][metric])
            words = [described(some[0].context, run)]
            words += _settings(some[0].context, [k for k in varying if k not in DESCRIBED])
            words += [f"best of {len(some)} seeds"] if len(some) > 1 else []
            found.append(Best(metric, " · ".join(words), line, any(is_own(c.lines[0]["context"], run) for c in some)))
    return sorted(found, key=lambda b: (not b.own, b.metric, -_size(b.line["context"]), b.value))


def is_own(context: dict, run: Run) -> bool:
    """Whether an evaluation was made as the run's config asks, as far as both tell."""
    asked = run.setting("eval", {})
    asked = asked if isinstance(asked, dict) else {}
    ema = asked.get("ema", 0)
    wanted = {"n": asked.get("num_samples"), "ema": "raw" if ema is None else f"ema_{ema}"}
    wanted |= {k: asked[k] for k in asked if k in context and k not in (*BESIDE, *NOT_SETTINGS)}
    return all(context.get(k) == v for k, v in wanted.items()) and "reference" not in (context.get("differs") or {})


def described(context: dict, run: Run) -> str:
    """`N 2,000 · EMA 0.995 · ddim, 50 steps, η 0`, of an evaluation's context."""
    n = context.get("n")
    parts = [f"N {n:,}" if isinstance(n, int) else "N unknown", run.ema(str(context.get("ema", "?")))]
    how = [str(context[k]) + unit for k, unit in (("sampler", ""), ("steps", " steps")) if k in context]
    if context.get("eta") not in (None, 0, 0.0) or context.get("sampler") == "ddim":
        how.append(f"η {_eta(context.get('eta', 0))}")
    if context.get("guidance", 1) != 1:
        how.append(f"guidance {guidance.shown(context['guidance'])}")
    return " · ".join([*parts, ", ".join(how)] if how else parts)


def _size(context: dict) -> int:
    n = context.get("n")
    return n if isinstance(n, int) else 0


def table(runs: list[Run]) -> str:
    """Every number of every evaluation."""
    lines = [(run, line) for run in runs for line in run.of("eval")]
    if not lines:
        return ""
    names = list(dict.fromkeys(name for _, line in lines for name in line["metrics"]))
    names.sort(key=lambda name: name == "seconds")
    head = [*(["run"] if len(runs) > 1 else []), "step", "images", "of", *names]
    rows, said = [], {}
    for run, line in lines:
        cells = [escaped(run.name)] if len(runs) > 1 else []
        how = described(line["context"], run)
        said[how] = said.get(how) or escaped(how)  # thousands of evaluations are of a few kinds
        cells += [f"{line['step']:,}", f"{line['images']:,}", said[how]]
        rows.append(cells + [short(line["metrics"][n]) if n in line["metrics"] else "" for n in names])
    return details(f"All {plural(len(lines), 'evaluation')}", make_table([escaped(name) for name in head], rows))


def _point(line: Line, metric: str) -> Point:
    low, high = interval(line, metric)
    return Point(line["images"], line["metrics"][metric], low, high, f"step {line['step']:,}")


def _names(drawn: list[Curve], several_runs: bool) -> list[str]:
    """What tells each line apart, and always its weights and number of samples."""
    varying = _varying([c.context for c in drawn])
    found = []
    for c in drawn:
        n = c.context.get("n")
        parts = [c.run.name] if several_runs else []
        parts += [c.run.ema(str(c.context.get("ema", "?"))), f"N {n:,}" if isinstance(n, int) else "N unknown"]
        found.append(" · ".join([*parts, *_settings(c.context, varying)]))
    return found


def _varying(contexts: list[dict]) -> list[str]:
    """What differs between evaluations beside their weights and number of samples; hashes last."""
    keys = dict.fromkeys(k for c in contexts for k in c if k not in BESIDE)
    return [k for k in (*keys, *HASHES) if len({json.dumps(c.get(k)) for c in contexts}) > 1]


def _settings(context: dict, keys: list[str]) -> list[str]:
    """`steps 50`, of those keys that the evaluation tells."""
    names = {"eta": "η"}
    return [f"{names.get(k, k)} {str(context[k])[: 8 if k in HASHES else LONGEST]}" for k in keys if k in context]


def _spread_note(drawn: list[Curve], metric: str) -> str:
    names = {name for c in drawn for line in c.lines for name in line["metrics"]}
    if f"{metric}_low" in names:
        return "Bands: 95 % bootstrap interval."
    return next((f"Bands: {what}." for suffix, what in SPREADS.items() if metric + suffix in names), "")


def _bound_note(drawn: list[Curve]) -> str:
    """A sentence that says whether the bound is clipped; none where the lines differ in that."""
    clipped = {bool(c.context.get("bpd_clip")) for c in drawn}
    if len(clipped) > 1:
        return ""
    return f"Every estimate of x₀ is {'clipped to [−1, 1]' if clipped == {True} else 'taken unclipped'}."


def _eta(eta: object) -> str:
    return "σ̂" if eta == "sigma_hat" else f"{eta:g}" if isinstance(eta, int | float) else str(eta)


def at(line: Line) -> str:
    return f"step {line['step']:,} ({count(line['images'])} images)"
