"""The triangle of quality, diversity and speed: an axis a corner, a closed line a run, further out is better."""

import math
from dataclasses import dataclass
from typing import Any

from dtrain.report.chart import COLOURS, DASHES
from dtrain.report.markup import escaped
from dtrain.report.numbers import log_ticks, short

WIDTH, HEIGHT = 1000, 850
CENTRE, RADIUS = (500.0, 540.0), 470.0
WORST = 0.25  # how far out the worst run lies on a logarithmic axis, as a share of the way to its corner
MARKS = (  # around a point; another shape a run, so that colours need not be told apart
    "m-13 0a13 13 0 1 0 26 0a13 13 0 1 0 -26 0z",
    "m-12 -12h24v24h-24z",
    "m0 -15l15 26h-30z",
    "m0 -17l17 17l-17 17l-17 -17z",
    "m0 15l15 -26h-30z",
)
SAID = (
    "Further out is better. Distance and seconds are logarithmic, from the worst of these runs at a quarter of the way "
    "to the best at the corner; recall is linear, from 0 at the centre to 1 at the corner."
)


@dataclass(frozen=True)
class Axis:
    """A corner. best, worst: of all runs; None of an axis from 0 to 1, on which more is better."""

    title: str
    name: str
    angle: float  # degrees from upwards, clockwise
    best: float | None = None
    worst: float | None = None

    def share(self, value: float) -> float:
        """How far out a value lies: 1 at the corner."""
        if self.best is None:
            return min(max(value, 0.0), 1.0)
        if self.best == self.worst:
            return 1.0
        return 1 - (1 - WORST) * math.log(value / self.best) / math.log(self.worst / self.best)

    def place(self, share: float) -> tuple[float, float]:
        """On the canvas, y downwards."""
        turn = math.radians(self.angle)
        return CENTRE[0] + RADIUS * share * math.sin(turn), CENTRE[1] - RADIUS * share * math.cos(turn)

    def ticks(self) -> list[float]:
        if self.best is None:
            return [0.25, 0.5, 0.75, 1.0]
        if self.best == self.worst:
            return [self.best]
        between = [t for t in log_ticks(self.best, self.worst, most=3) if 0.3 < self.share(t) < 0.9]
        return [self.best, *between, self.worst]


def values(found: dict[str, Any]) -> list[tuple[float, float, float]]:
    """(distance, recall, seconds a thousand) of each run."""
    metrics = found["metrics"]
    own = [run["own"] for run in found["runs"]]
    return [(p["metrics"][metrics["fd"]], p["metrics"][metrics["recall"]], p["seconds_per_thousand"]) for p in own]


def axes(found: dict[str, Any]) -> list[Axis]:
    distances, _, seconds = zip(*values(found), strict=True)
    return [
        Axis("quality", found["metrics"]["fd"], 0, min(distances), max(distances)),
        Axis("diversity", "recall", -120),
        Axis("speed", "seconds a thousand", 120, min(seconds), max(seconds)),
    ]


def html(found: dict[str, Any]) -> str:
    """The figure with its legend, its scales in words, and which runs no other one makes superfluous; nothing where a
    distance is no positive number.
    """
    points = values(found)
    if not all(math.isfinite(v) and v > 0 for distance, _, seconds in points for v in (distance, seconds)):
        return ""
    corners = axes(found)
    names = [run["name"] for run in found["runs"]]
    frame = "".join(_closed([axis.place(share) for axis in corners], "grid") for share in (0.25, 0.5, 0.75, 1.0))
    spokes = "".join(
        f'<path class="grid" d="M{CENTRE[0]} {CENTRE[1]}L{x:.1f} {y:.1f}"/>' for x, y in (a.place(1) for a in corners)
    )
    lines = "".join(_run(number, names[number], corners, point) for number, point in enumerate(points))
    said = "quality, diversity and speed of " + ", ".join(names)
    keys = "".join(
        f'<span class="key dash{i % DASHES}" style="--c:var(--s{i % COLOURS})"><svg viewBox="-50 -18 100 36" '
        f'width="44" height="16" aria-hidden="true"><path class="line" d="M-50 0H50"/><path class="mark" '
        f'd="M0 0{MARKS[i % len(MARKS)]}"/></svg>{escaped(name)}</span>'
        for i, name in enumerate(names)
    )
    return (
        f'<figure class="trilemma"><div class="corners"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escaped(said)}"><title>{escaped(said)}</title>{frame}{spokes}{lines}</svg>'
        f'{"".join(_labels(axis) for axis in corners)}</div><figcaption><p class="legend">{keys}</p>'
        f'<p class="note">{SAID}</p><p class="note">{escaped(superfluous(names, points))}</p></figcaption></figure>'
    )


def superfluous(names: list[str], points: list[tuple[float, float, float]]) -> str:
    """Which runs are no better in anything than another one, in words."""
    lines = []
    for i, (distance, recall, seconds) in enumerate(points):
        for j, (d, r, s) in enumerate(points):
            as_good = d <= distance and r >= recall and s <= seconds
            if i != j and as_good and (d, r, s) != (distance, recall, seconds):
                lines.append(f"{names[i]} is better in none of the three than {names[j]}")
                break
    return f"{'; '.join(lines)}." if lines else "None of these runs is beaten in all three by another one."


def _closed(spots: list[tuple[float, float]], kind: str) -> str:
    return f'<path class="{kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in spots)}Z"/>'


def _run(number: int, name: str, corners: list[Axis], point: tuple[float, float, float]) -> str:
    spots = [axis.place(axis.share(value)) for axis, value in zip(corners, point, strict=True)]
    told = "; ".join(f"{axis.name} {short(value)}" for axis, value in zip(corners, point, strict=True))
    marks = "".join(f'<path class="mark" d="M{x:.1f} {y:.1f}{MARKS[number % len(MARKS)]}"/>' for x, y in spots)
    return (
        f'<g class="dash{number % DASHES}" style="--c:var(--s{number % COLOURS})"><title>{escaped(f"{name}: {told}")}'
        f"</title>{_closed(spots, 'band')}{_closed(spots, 'line')}{marks}</g>"
    )


def _labels(axis: Axis) -> str:
    """What a corner is, and numbers along its axis."""

    def at(x: float, y: float) -> str:
        return f"left:{x / WIDTH * 100:.2f}%;top:{y / HEIGHT * 100:.2f}%"

    side = "top" if axis.angle == 0 else "left" if axis.angle < 0 else "right"
    ticks = "".join(
        f'<span class="tick {side}" style="{at(*axis.place(axis.share(t)))}">{short(t)}</span>' for t in axis.ticks()
    )
    name = f'<span class="corner {side}" style="{at(*axis.place(1))}"><b>{axis.title}</b> {escaped(axis.name)}</span>'
    return name + ticks
