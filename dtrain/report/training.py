"""The training's own curves: loss, loss by noise level, step size and gradient, speed."""

import itertools
import math
import re
import statistics

from dtrain.report.chart import Chart, Point, Series, averaged, line_of
from dtrain.report.runs import Line, Run

LEVEL = re.compile(r"loss_level_([0-9]{1,4})$")
FEWER = 120  # points of one of many lines


def charts(runs: list[Run]) -> list[Chart]:
    loss = _over_images(runs, "loss", "loss", "mean over the global batch")
    norm = _over_images(runs, "grad_norm", "gradient norm", "L2, before clipping")
    rate = _over_images(runs, "lr", "learning rate")
    return [loss, *_levels(runs), norm, rate]


def speed(runs: list[Run]) -> list[Chart]:
    """Over hours of the clock: what a run did in its time, stops and all."""
    waits = {"images_per_second": 1.0, "data_wait": 100.0, "mfu": 100.0, "peak_memory_gib": 1.0}
    titles = {
        "images_per_second": ("throughput", "images a second, all ranks"),
        "data_wait": ("waiting for data", "% of a step, slowest rank"),
        "mfu": ("model FLOPs utilisation", "% of measured GEMM speed"),
        "peak_memory_gib": ("peak memory", "GiB a rank"),
    }
    found = []
    for name, factor in waits.items():
        series = []
        for number, run in enumerate(runs):
            begin = run.happened[0]["time"]
            points, breaks, attempt = [], set(), None
            lines = _thinned(run.of("train"))
            pauses = [b["time"] - a["time"] for a, b in itertools.pairwise(lines)]
            long = 5 * statistics.median(pauses) if pauses else math.inf
            for line in lines:
                value = _data_wait(line) if name == "data_wait" else line["metrics"].get(name)
                if value is None or not math.isfinite(value):
                    continue
                since = line["time"] - begin - points[-1].x if points else 0.0
                if line["attempt"] != attempt or since > long:  # a stop, or an evaluation
                    breaks.add(len(points))
                    attempt = line["attempt"]
                label = f"step {line['step']:,}, attempt {attempt}"
                points.append(Point(line["time"] - begin, factor * value, label=label))
            series.append(Series(_name(run, runs), points, *line_of(number), breaks=frozenset(breaks)))
        title, unit = titles[name]
        found.append(Chart(title, series, "time since the first start", unit, time=True, zero=True))
    return found


def _over_images(runs: list[Run], metric: str, title: str, unit: str = "") -> Chart:
    series, lost = [], 0
    averaging = False
    for number, run in enumerate(runs):
        lines = [line for line in run.of("train") if metric in line["metrics"]]
        x, y = _finite(lines, metric)
        lost += len(lines) - len(x)
        fewer = averaged(x, y)
        averaging |= len(fewer) < len(x)
        series.append(Series(_name(run, runs), fewer, *line_of(number)))
    notes = ["Lines are means of neighbouring values; bands reach from the lowest to the highest."] if averaging else []
    if (every := max(run.every for run in runs)) > 1:
        notes.append(f"Of a long journal one line in {every} is read.")
    notes += [f"{lost} values are not finite and have no place here."] if lost else []
    return Chart(title, series, y_name=unit, note=" ".join(notes))


def _finite(lines: list[Line], metric: str) -> tuple[list[int], list[float]]:
    """(images, values) of a metric where it is a finite number."""
    found = [(line["images"], value) for line in lines if math.isfinite(value := line["metrics"].get(metric, math.nan))]
    return ([x for x, _ in found], [y for _, y in found])


def _levels(runs: list[Run]) -> list[Chart]:
    """Where in the process the loss is: by eighths, over training; and at the end on held-out images, run by run."""
    found = []
    for run in runs:
        lines, series = run.of("train"), []
        logged = {n for names in {tuple(line["metrics"]) for line in lines} for n in names}
        names = sorted(filter(LEVEL.match, logged), key=_level)
        for name in names:
            points = averaged(*_finite(lines, name), FEWER)
            plain = [Point(p.x, p.y) for p in points]  # eight bands would hide each other
            series.append(Series(_eighth(_level(name), len(names)), plain, f"l{_level(name) % 8}"))
        title = "loss by noise level" + (f" · {run.name}" if len(runs) > 1 else "")
        note = "Unweighted, by eighths of the process from clean data to noise; means of neighbouring values."
        found.append(Chart(title, series, note=note))
    ends = []
    for number, run in enumerate(runs):
        validations = [line for line in run.of("validation") if any(LEVEL.match(n) for n in line["metrics"])]
        if not validations:
            continue
        line = validations[-1]
        names = sorted((n for n in line["metrics"] if LEVEL.match(n)), key=_level)
        points = [Point((_level(n) + 0.5) / len(names), line["metrics"][n]) for n in names]
        name = f"{_name(run, runs) + ' · ' if len(runs) > 1 else ''}step {line['step']:,}"
        ends.append(Series(name, [p for p in points if math.isfinite(p.y)], *line_of(number), dots=True))
    unit = "training's loss at the middle of each eighth"
    place = "place in the process: 0 clean data, 1 noise"
    held_out = Chart("held-out loss by noise level", ends, place, unit, x_ends=(0.0, 1.0))
    return [*found, held_out]


def _eighth(level: int, of: int) -> str:
    """The level's share of the process."""
    where = ", least noise" if level == 0 else ", most noise" if level == of - 1 else ""
    return f"{level / of:.3g} – {(level + 1) / of:.3g}{where}"


def _level(name: str) -> int:
    return int(LEVEL.match(name)[1])


def _thinned(lines: list[Line], most: int = 400) -> list[Line]:
    """Every so many-th line: a speed is one of its moment and is not averaged over a stop."""
    return lines[:: -(-len(lines) // most) or 1]


def _data_wait(line: Line) -> float | None:
    waited, step = line["metrics"].get("data_wait_seconds"), line["metrics"].get("step_seconds")
    return waited / step if waited is not None and step else None


def _name(run: Run, runs: list[Run]) -> str:
    return run.name if len(runs) > 1 else ""
