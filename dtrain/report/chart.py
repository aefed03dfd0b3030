"""A curve as SVG that stretches with the page while lines, dots and letters keep their size.

The SVG has a 1000 × 1000 canvas that is stretched to whatever box the page gives (`non-scaling-stroke`); labels are
HTML placed by per cent. So the same chart is crisp at 400 and at 1280 pixels, without a script.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from dtrain.credentials import redacted
from dtrain.report.markup import escaped
from dtrain.report.numbers import count, duration, log_ticks, short, ticks, time_ticks

MOST_POINTS = 400  # of one line; more are averaged
LOG_FROM = 12.0  # highest over lowest value from which a positive curve is drawn on a logarithmic axis
SMALLEST = 1e-100  # that has a place on it
COLOURS, DASHES = 8, 4


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None = None  # of the interval around y
    high: float | None = None
    label: str = ""  # what is said beside the value


@dataclass(frozen=True)
class Series:
    name: str
    points: list[Point]
    colour: str = "s0"  # a CSS variable: s0 … s7 tell lines apart, l0 … l7 are levels from low to high
    dash: int = 0
    dots: bool = False
    breaks: frozenset[int] = frozenset()  # points that are not joined to the one before


@dataclass(frozen=True)
class Chart:
    title: str
    series: list[Series]
    x_name: str = "images seen"
    y_name: str = ""
    note: str = ""
    time: bool = False  # x is seconds
    x_ends: tuple[float, float] | None = None  # of the x axis; default: what the points need
    wide: bool = False
    zero: bool = False  # the axis begins at 0
    log_x: bool = False  # of x above 0
    log_y: bool = False  # however near the values are

    def html(self) -> str:
        """A <figure>; nothing where no series has a point, and numbers where none has a second one."""
        series = [s for s in self.series if s.points]
        if not series:
            return ""
        if all(len(s.points) == 1 for s in series):
            return self._numbers(series)
        x_range, y_range, log = self._ranges(series)

        def place(x: float, y: float) -> tuple[float, float]:
            """On the canvas, y downwards."""
            low, high = (math.log(v) for v in y_range) if log else y_range
            left, right = (math.log(v) for v in x_range) if self.log_x else x_range
            value = math.log(max(y, y_range[0])) if log else y
            across = (math.log(x) if self.log_x else x) - left
            return 1000 * across / (right - left), 1000 * (1 - (value - low) / (high - low))

        x_ticks = (log_ticks if self.log_x else time_ticks if self.time else ticks)(*x_range)
        y_ticks = log_ticks(*y_range) if log else ticks(*y_range, most=5)
        lines = [f'<path class="grid" d="M0 {place(x_range[0], t)[1]:.1f}H1000"/>' for t in y_ticks]
        lines += [f'<path class="grid" d="M{place(t, y_range[1])[0]:.1f} 0V1000"/>' for t in x_ticks]
        y_labels = [
            f'<span class="y" style="top:{place(x_range[0], t)[1] / 10:.2f}%">{short(t)}</span>' for t in y_ticks
        ]
        x_labels = [
            f'<span class="x{" odd" if i % 2 else ""}" style="left:{place(t, y_range[1])[0] / 10:.2f}%">'
            f"{(duration if self.time else count)(t)}</span>"
            for i, t in enumerate(x_ticks)
        ]
        drawn = "".join(_drawn(s, number, place) for number, s in enumerate(series))
        unit = " · ".join(filter(None, [self.y_name, "logarithmic" if log else ""]))
        said = f"{self.title}: {self.y_name or 'value'} over {self.x_name}, {len(series)} lines"
        return (
            f'<figure class="chart{" wide" if self.wide else ""}">{self._caption(unit)}'
            f'<div class="frame"><div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
            f'aria-label="{escaped(said)}"><title>{escaped(said)}</title>{"".join(lines)}{drawn}</svg>'
            f'{"".join(y_labels)}{"".join(x_labels)}<i class="cursor"></i><div class="tip"></div></div></div>'
            f'<p class="axis">{escaped(self.x_name)}{" · logarithmic" if self.log_x else ""}</p>{_legend(series)}'
            f'{self._note()}<script type="application/json">{_data(series, x_range, self.log_x)}</script></figure>'
        )

    def _numbers(self, series: list[Series]) -> str:
        """One point a series: a line through it would say nothing."""
        tiles = []
        for s in series:
            (point,) = s.points
            spread = f"{short(point.low)} – {short(point.high)}" if None not in (point.low, point.high) else ""
            where = f"{self.x_name} {(duration if self.time else count)(point.x)}"
            below = "".join(f"<small>{escaped(words)}</small>" for words in (spread, point.label, where) if words)
            name = f'<i class="swatch" style="--c:var(--{s.colour})"></i>{escaped(s.name)}' if s.name else ""
            tiles.append(f"<div><dt>{name}</dt><dd>{short(point.y)}{below}</dd></div>")
        content = f'{self._caption(self.y_name)}<dl class="tiles">{"".join(tiles)}</dl>{self._note()}'
        return f'<figure class="single">{content}</figure>'

    def _caption(self, unit: str) -> str:
        return f'<figcaption><b>{escaped(self.title)}</b><span class="unit">{escaped(unit)}</span></figcaption>'

    def _note(self) -> str:
        return f'<p class="note">{escaped(self.note)}</p>' if self.note else ""

    def _ranges(self, series: list[Series]) -> tuple[tuple[float, float], tuple[float, float], bool]:
        """(x from, to), (y from, to), whether y is logarithmic."""
        points = [p for s in series for p in s.points]
        xs = [p.x for p in points]
        ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
        left, right = self.x_ends or (min(xs), max(xs))
        if self.log_x:
            left, right = left / 1.25, right * 1.25
        elif left == right:
            left, right = left - 0.5 * (abs(left) or 1), right + 0.5 * (abs(right) or 1)
        elif 0 <= left < 0.5 * right:
            left = 0.0
        low, high = min(ys), max(ys)
        means = [p.y for p in points]
        wide = self.log_y or max(means) / max(min(means), SMALLEST) >= LOG_FROM
        if not self.zero and min(means) > SMALLEST and wide:
            low = max(low, min(means) / 4)  # an interval that reaches zero has no place on this axis
            return (left, right), (low / 1.15, high * 1.15), True
        if self.zero or (0 <= low < 0.35 * high):
            low = min(0.0, low)
        space = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        return (left, right), (low - (space if low else 0.0), high + space), False


def line_of(number: int) -> tuple[str, int]:
    """(colour, dash) of the number-th of several lines: another dash when the colours are used up."""
    return f"s{number % COLOURS}", number // COLOURS


def averaged(x: list[float], y: list[float], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: means of equally many neighbours, with the lowest and the highest of them as interval."""
    each = -(-len(x) // most)
    if each <= 1:
        return list(map(Point, x, y))
    parts = [(x[i : i + each], y[i : i + each]) for i in range(0, len(x), each)]
    return [Point(sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)) for xs, ys in parts]


def _drawn(series: Series, number: int, place: Callable[[float, float], tuple[float, float]]) -> str:
    spots = [place(p.x, p.y) for p in series.points]
    line = "".join(f"{'L' if i and i not in series.breaks else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(spots))
    inside = [p for p in series.points if p.low is not None and p.high is not None]
    band = ""
    if len(inside) > 1 and not series.breaks:
        upper = [place(p.x, p.high) for p in inside]
        lower = [place(p.x, p.low) for p in reversed(inside)]
        band = f'<path class="band" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in upper + lower)}Z"/>'
    dots = whiskers = ""
    if series.dots or len(spots) == 1:
        dots = f'<path class="dots" d="{"".join(f"M{x:.1f} {y:.1f}h.01" for x, y in spots)}"/>'
        ends = [(*place(p.x, p.low), place(p.x, p.high)[1]) for p in inside]
        whiskers = (
            f'<path class="whiskers" d="{"".join(f"M{x:.1f} {a:.1f}V{b:.1f}" for x, a, b in ends)}"/>' if ends else ""
        )
    return (
        f'<g class="series dash{series.dash % DASHES}" data-series="{number}" style="--c:var(--{series.colour})">'
        f'{band}<path class="line" d="{line}"/>{whiskers}{dots}</g>'
    )


def _legend(series: list[Series]) -> str:
    if len(series) == 1 and not series[0].name:
        return ""
    items = [
        f'<button type="button" class="key dash{s.dash % DASHES}" aria-pressed="true" data-series="{i}" '
        f'style="--c:var(--{s.colour})"><svg viewBox="0 0 28 10" width="28" height="10" aria-hidden="true">'
        f'<path class="line" d="M1 5H27"/></svg>{escaped(s.name)}</button>'
        for i, s in enumerate(series)
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def _data(series: list[Series], x_range: tuple[float, float], log: bool) -> str:
    """Every number of the chart in full, for the script that reads them out under the pointer."""
    lines = [
        {
            "name": redacted(s.name),
            "colour": s.colour,
            "points": [[p.x, p.y, p.low, p.high, p.label and redacted(p.label)] for p in s.points],
        }
        for s in series
    ]
    found = {"x": x_range, **({"log": True} if log else {}), "series": lines}
    return json.dumps(found, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
