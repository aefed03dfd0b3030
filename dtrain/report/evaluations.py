"""Evaluations as curves: one line for each run, metric, weights, number of samples and way of sampling.

A line never joins evaluations that differ in any of these: a Fréchet distance of fewer samples is another, larger one.
"""

import json
import math
from dataclasses import dataclass

from dtrain.report.chart import Chart, Point, Series, line_of
from dtrain.report.markup import details, escaped, plural
from dtrain.report.markup import table as make_table
from dtrain.report.numbers import count, short
from dtrain.report.runs import Line, Run
from dtrain.tracking.best import better, higher_is_better

# What belongs to a value of a metric and is drawn as its interval.
SPREADS = {"_std": "± one standard deviation over subsets", "_error": "± the error of the fit"}
NOT_METRICS = ("seconds", "bpd_prior", "bpd_chain", "bpd_decoder")
NOT_SETTINGS = ("artifact", "differs", "batch_size")  # the size of a block changes no more than the rounding
BESIDE = ("ema", "n", "features", "extractor", "reference")  # said of every line, or in the metric's name


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
    belongs = {f"{name}{suffix}" for name in names for suffix in ("_low", "_high", *SPREADS)}
    return [name for name in names if name not in belongs and name not in NOT_METRICS]


def is_distance(metric: str) -> bool:
    """Whether it is a Fréchet distance: what runs are compared by."""
    return metric == "fid" or (metric.startswith("fd_") and not metric.startswith("fd_infinity"))


def curves(runs: list[Run]) -> dict[str, list[Curve]]:
    """By metric, Fréchet distances first."""
    groups: dict[tuple[str, int, str], dict[tuple, Line]] = {}
    for number, run in enumerate(runs):
        for line in run.of("eval"):
            context = {k: v for k, v in line["context"].items() if k not in NOT_SETTINGS}
            for metric in metrics_of(line):
                if math.isfinite(line["metrics"][metric]):
                    group = groups.setdefault((metric, number, json.dumps(context, sort_keys=True)), {})
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
        drawn = [c for c in all_curves if len(c.lines) > 1] or all_curves
        names = _names(drawn, len(runs) > 1)
        # Runs by colour and what else differs by dashes; within one run, lines by colour.
        series, within = [], {}
        for place, (curve, name) in enumerate(zip(drawn, names, strict=True)):
            order = within[curve.number] = within.get(curve.number, -1) + 1
            colour, dash = line_of(curve.number) if len(runs) > 1 else line_of(place)
            dash += order if len(runs) > 1 else 0
            points = [_point(line, metric) for line in curve.lines]
            series.append(Series(name, points, colour, dash, dots=True))
        apart = len(all_curves) - len(drawn)
        notes = [_spread_note(drawn, metric)]
        notes += [f"{apart} single evaluations with other settings are in the table below." if apart else ""]
        which = "higher" if higher_is_better(metric) else "lower"
        found.append(Chart(metric, series, y_name=f"{which} is better", note=" ".join(filter(None, notes)), wide=True))
    return found


def best_of(run: Run) -> list[tuple[str, str, Line]]:
    """(metric, what it was of, line) of the best Fréchet distance for each metric, number of samples and reference."""
    found: dict[tuple, tuple[str, str, Line]] = {}
    for metric, all_curves in curves([run]).items():
        if not is_distance(metric):
            continue
        for curve in all_curves:
            key = (metric, *(curve.context.get(k) for k in ("n", "extractor", "reference")))  # else not comparable
            line = curve.best
            if key not in found or line["metrics"][metric] < found[key][2]["metrics"][metric]:
                found[key] = metric, described(curve.context, run), line
    return sorted(found.values(), key=lambda f: (f[0], -_size(f[2]["context"])))


def described(context: dict, run: Run) -> str:
    """`N 2,000 · EMA 0.995 · ddim, 50 steps, η 0`, of an evaluation's context."""
    n = context.get("n")
    parts = [f"N {n:,}" if isinstance(n, int) else "N unknown", run.ema(str(context.get("ema", "?")))]
    how = [str(context[k]) + unit for k, unit in (("sampler", ""), ("steps", " steps")) if k in context]
    if context.get("eta") not in (None, 0, 0.0) or context.get("sampler") == "ddim":
        how.append(f"η {_eta(context.get('eta', 0))}")
    if context.get("guidance", 1) != 1:
        how.append(f"guidance {context['guidance']:g}")
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
    rows = []
    for run, line in lines:
        cells = [escaped(run.name)] if len(runs) > 1 else []
        cells += [f"{line['step']:,}", f"{line['images']:,}", escaped(described(line["context"], run))]
        rows.append(cells + [short(line["metrics"][n]) if n in line["metrics"] else "" for n in names])
    return details(f"All {plural(len(lines), 'evaluation')}", make_table([escaped(name) for name in head], rows))


def _point(line: Line, metric: str) -> Point:
    low, high = interval(line, metric)
    return Point(line["images"], line["metrics"][metric], low, high, f"step {line['step']:,}")


def _names(drawn: list[Curve], several_runs: bool) -> list[str]:
    """What tells each line apart, and always its weights and number of samples."""
    keys = list(dict.fromkeys(k for c in drawn for k in c.context if k not in BESIDE))
    varying = [k for k in keys if len({json.dumps(c.context.get(k)) for c in drawn}) > 1]
    sources = [k for k in ("extractor", "reference") if len({c.context.get(k) for c in drawn}) > 1]
    found = []
    for c in drawn:
        n = c.context.get("n")
        parts = [c.run.name] if several_runs else []
        parts += [c.run.ema(str(c.context.get("ema", "?"))), f"N {n:,}" if isinstance(n, int) else "N unknown"]
        parts += [f"{'η' if k == 'eta' else k} {c.context.get(k)}" for k in varying]
        parts += [f"{k} {str(c.context.get(k))[:8]}" for k in sources]
        found.append(" · ".join(parts))
    return found


def _spread_note(drawn: list[Curve], metric: str) -> str:
    names = {name for c in drawn for line in c.lines for name in line["metrics"]}
    if f"{metric}_low" in names:
        return "Bands: 95 % bootstrap interval."
    return next((f"Bands: {what}." for suffix, what in SPREADS.items() if metric + suffix in names), "")


def _eta(eta: object) -> str:
    return "σ̂" if eta == "sigma_hat" else f"{eta:g}" if isinstance(eta, int | float) else str(eta)


def at(line: Line) -> str:
    return f"step {line['step']:,} ({count(line['images'])} images)"
