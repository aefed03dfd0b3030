"""What a sweep found: a table of the last two axes that vary, one for each choice of the others."""

import json
import math
import statistics

from dtrain.report.chart import Chart, Point, Series, line_of
from dtrain.report.evaluations import metrics_of
from dtrain.report.markup import escaped
from dtrain.report.numbers import short
from dtrain.report.runs import Line, Run
from dtrain.tracking.best import better, higher_is_better, settings_of

MOST_CELLS = 20_000  # of a sweep's tables
WIDTH = "sigma_"  # what the weights of an average of any width are called, before the width
AXES = {"step": "checkpoint", "ema": "weights", "guidance": "guidance", "eta": "η", "steps": "steps S"}


def html(runs: list[Run]) -> str:
    """Every sweep of every run."""
    found = []
    for run in runs:
        groups: dict[str, list[Line]] = {}
        for line in run.sweeps:
            same = {k: v for k, v in settings_of(line).items() if k not in AXES and k != "seed"}
            groups.setdefault(json.dumps(same, sort_keys=True), []).append(line)
        for lines in groups.values():
            for metric in metrics_of(lines[0]):
                found.append(_one(run, lines, metric, len(runs) > 1))
    return "".join(found)


def _one(run: Run, lines: list[Line], metric: str, several_runs: bool) -> str:
    cells: dict[tuple, list[float]] = {}
    for line in lines:
        value = line["metrics"].get(metric, math.nan)
        if math.isfinite(value):
            cells.setdefault(tuple(_value(line, axis) for axis in AXES), []).append(value)
    if not cells:
        return ""
    values = {setting: statistics.fmean(found) for setting, found in cells.items()}
    best = better(metric)(values, key=values.get)
    choices = [sorted({setting[i] for setting in cells}, key=_order) for i in range(len(AXES))]
    varying = [i for i, among in enumerate(choices) if len(among) > 1]
    *panels, row, column = [None, None, *varying][-max(2, len(varying)) :]
    low, high = min(values.values()), max(values.values())
    labels = list(AXES.values())
    tables = []
    there = {tuple(setting[i] for i in panels) for setting in values}
    shown = sorted(there, key=lambda panel: [_order(value) for value in panel])
    across = [len(choices[i]) if i is not None else 1 for i in (row, column)]
    for panel in shown if len(shown) * math.prod(across) <= MOST_CELLS else []:

        def cell(row_value, column_value, panel=panel) -> str:
            at = dict(zip(panels, panel, strict=True)) | {row: row_value, column: column_value}
            setting = tuple(at.get(i, choices[i][0]) for i in range(len(AXES)))
            if setting not in values:
                return '<td class="none">–</td>'
            share = 0.0 if high == low else (values[setting] - low) / (high - low)
            good = share if higher_is_better(metric) else 1 - share
            spread = f"<small> ± {statistics.stdev(cells[setting]):.2g}</small>" if len(cells[setting]) > 1 else ""
            mark, label = (' class="best"', "★ ") if setting == best else ("", "")
            return f'<td{mark} style="--good:{100 * good:.0f}%">{label}{short(values[setting])}{spread}</td>'

        columns = choices[column] if column is not None else [None]
        rows = choices[row] if row is not None else [None]
        head = "".join(f'<th scope="col">{_shown(column, value, run)}</th>' for value in columns)
        body = "".join(
            f'<tr><th scope="row">{_shown(row, r, run)}</th>{"".join(cell(r, c) for c in columns)}</tr>' for r in rows
        )
        corner = " \\ ".join(labels[i] for i in (row, column) if i is not None)
        said = ", ".join(f"{labels[i]} {_shown(i, v, run)}" for i, v in zip(panels, panel, strict=True))
        tables.append(
            f'<div class="scroll">{f"<p><b>{said}</b></p>" if said else ""}<table class="heat"><thead><tr>'
            f"<th>{escaped(corner)}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    context = lines[0]["context"]
    seeds = len({line["context"].get("seed") for line in lines})
    fixed = [
        f"{labels[i]} {_shown(i, choices[i][0], run)}"
        for i in range(len(AXES))
        if i not in varying and choices[i][0] is not None
    ]
    n = context.get("n")
    facts = [f"N {n:,}" if isinstance(n, int) else "N unknown", str(context.get("sampler", "")), *fixed]
    facts += [f"mean ± standard deviation over {seeds} seeds"] if seeds > 1 else []
    setting = ", ".join(f"{labels[i]} {_shown(i, best[i], run)}" for i in varying) or "the only setting"
    facts += [] if tables else [f"{len(values):,} combinations, too many for a table"]
    title = f"{metric}{f' · {run.name}' if several_runs else ''}"
    return (
        f'<div class="sweep"><h3>{escaped(title)}</h3><p class="note">{escaped(" · ".join(filter(None, facts)))}</p>'
        f'<div class="panels">{"".join(tables)}</div>{_over_widths(values, metric, labels, run)}'
        f"<p>★ best: <b>{short(values[best])}</b> at {escaped(setting)}</p></div>"
    )


def _over_widths(values: dict[tuple, float], metric: str, labels: list[str], run: Run) -> str:
    """The curve over the averages' widths, a line for each choice of the other axes; nothing where there are no two."""
    place, lines = list(AXES).index("ema"), {}
    for setting, value in values.items():
        weights = str(setting[place])
        if weights.startswith(WIDTH):
            others = tuple(None if i == place else at for i, at in enumerate(setting))
            lines.setdefault(others, []).append(Point(float(weights.removeprefix(WIDTH)), value))
    varying = [i for i in range(len(AXES)) if len({others[i] for others in lines}) > 1]
    series = []
    for number, (others, points) in enumerate(lines.items()):
        name = ", ".join(f"{labels[i]} {_shown(i, others[i], run)}" for i in varying)
        colour, dash = line_of(number)
        series.append(Series(name, sorted(points, key=lambda point: point.x), colour, dash, dots=True))
    if not any(len(one.points) > 1 for one in series):
        return ""
    return Chart(metric, series, "width σ_rel of the average").html()


def _value(line: Line, axis: str):
    return line.get("step") if axis == "step" else line["context"].get(axis)


def _order(value) -> tuple:
    """Numbers by size, then words."""
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def _shown(axis: int | None, value, run: Run) -> str:
    if axis is None or value is None:
        return ""
    if list(AXES)[axis] == "ema":
        return escaped(run.ema(str(value)))
    if value == "sigma_hat":
        return "σ̂"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else escaped(value)
