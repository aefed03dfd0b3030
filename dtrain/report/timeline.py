"""What happened to a run by the clock: attempts, evaluations, checkpoints, faults."""

import itertools
import math
from dataclasses import dataclass

from dtrain.credentials import MASK, is_secret
from dtrain.report.markup import details, escaped, plural, table
from dtrain.report.numbers import clock, duration, short, time_ticks
from dtrain.report.runs import Line, Run

MOST_ROWS = 500  # of the table of events, and of marks in a lane
LONGEST = 2000  # characters of what is said of an event
NOTABLE = ("fault", "eval_failed", "config", "bad_sample")  # drawn in the lane of events


def html(runs: list[Run]) -> str:
    return "".join(_timeline(run, len(runs) > 1) for run in runs)


def lost_steps(run: Run) -> list[int]:
    """How many steps of each attempt a later one went through again, as far as they were journaled."""
    begins = [(line["attempt"], line["step"]) for line in run.happened if line["event"] == "attempt"]
    found = []
    for lines in run.attempts:
        reached = max(line["step"] for line in lines)
        resumed = min((step for number, step in begins if number > lines[0]["attempt"]), default=reached)
        found.append(max(0, reached - resumed))
    return found


@dataclass(frozen=True)
class Clock:
    """The width of a time line in unix seconds."""

    begin: float
    end: float

    def left(self, time: float) -> float:
        """Per cent of the width."""
        return 100 * (time - self.begin) / (self.end - self.begin)

    def bar(self, kind: str, start: float, stop: float, title: str, text: str = "") -> str:
        start = max(start, self.begin)
        width = max(0.0, self.left(stop) - self.left(start))
        shown = f"<span>{escaped(text)}</span>" if text and width > 5 else ""
        place = f"left:{self.left(start):.3f}%;width:{width:.3f}%"
        return f'<i class="{kind}" style="{place}" title="{escaped(title)}">{shown}</i>'


def _timeline(run: Run, several: bool) -> str:
    everything = sorted([*run.happened, *run.elsewhere], key=lambda line: line["time"])
    begin = everything[0]["time"]
    at = Clock(begin, max(everything[-1]["time"], begin + 1))
    rows = "".join(_lane(name, marks) for name, marks in _lanes(run, everything, at).items() if marks)
    span = at.end - begin
    axis = "".join(
        f'<span class="x{" odd" if i % 2 else ""}" style="left:{at.left(begin + t):.2f}%">{duration(t)}</span>'
        for i, t in enumerate(time_ticks(0, span))
    )
    parts = run.attempts
    away = sum(max(0.0, b[0]["time"] - a[-1]["time"]) for a, b in itertools.pairwise(parts))
    said = f"{clock(begin)} to {clock(at.end)}: {duration(span)}"
    said += f", of which {duration(away)} between attempts." if len(parts) > 1 else "."
    said += " Hatched: steps that a later attempt went through again." if any(lost_steps(run)) else ""
    title = f"<h3>{escaped(run.name)}</h3>" if several else ""
    scale = f'<div class="lane"><span></span><div class="times">{axis}</div></div>'
    return f'<div class="timeline">{title}<p class="note">{said}</p>{rows}{scale}{_events(run, everything)}</div>'


def _lanes(run: Run, everything: list[Line], at: Clock) -> dict[str, list[str]]:
    """What to draw below each other. An evaluation by a job of its own, perhaps days later, is not among it."""
    lanes = {"attempts": _attempts(run, at), "evaluations": [], "checkpoints": [], "events": []}
    happened = {id(line) for line in run.happened}
    for line in _spread([line for line in run.of("eval") if id(line) in happened]):
        seconds = line["metrics"].get("seconds", 0.0)
        seconds = seconds if math.isfinite(seconds) else 0.0
        title = f"evaluation at step {line['step']:,}, {duration(seconds)}"
        lanes["evaluations"].append(at.bar("eval", line["time"] - seconds, line["time"], title))
    for line in _spread(run.of("checkpoint")):
        lanes["checkpoints"].append(at.bar("save", line["time"], line["time"], f"checkpoint of step {line['step']:,}"))
    for line in _spread([line for line in everything if line["event"] in NOTABLE]):
        kind = "fault" if line["event"] in ("fault", "eval_failed") else "notice"
        lanes["events"].append(at.bar(kind, line["time"], line["time"], f"step {line['step']:,}: {_said(line)}"))
    return lanes


def _attempts(run: Run, at: Clock) -> list[str]:
    marks = []
    valid = {id(line) for line in run.lines}
    for lines, lost in zip(run.attempts, lost_steps(run), strict=True):
        number, first, last = lines[0]["attempt"], lines[0], lines[-1]
        ranks = next((line["context"].get("world_size") for line in lines if line["event"] == "attempt"), None)
        title = f"attempt {number}: steps {first['step']:,} to {max(line['step'] for line in lines):,}"
        title += f", {plural(ranks, 'rank')}" if ranks else ""
        title += f", {duration(last['time'] - first['time'])}"
        marks.append(at.bar("attempt", first["time"], last["time"], title, str(number)))
        if lost:
            void = [line for line in lines if id(line) not in valid]
            since = void[0]["time"] if void else last["time"]
            title = f"{plural(lost, 'step')} that a later attempt went through again"
            marks.append(at.bar("lost", since, last["time"], title))
    if run.state != "running":
        marks.append(f'<i class="end" style="left:100%" title="{escaped(run.state)}"></i>')
    return marks


def _spread(found: list) -> list:
    """All, or every so many-th: more marks than a lane has pixels tell nothing."""
    return found[:: -(-len(found) // MOST_ROWS) or 1]


def _lane(name: str, marks: list[str]) -> str:
    """All marks, or every so many-th."""
    said = f"{plural(len(marks), 'mark')}: {name}"
    shown = "".join(_spread(marks))
    return f'<div class="lane"><span>{name}</span><div class="track" role="img" aria-label="{said}">{shown}</div></div>'


def _events(run: Run, everything: list[Line]) -> str:
    """The time line as a table, for those who cannot see it and those who want to know."""
    wanted = [line for line in everything if line["event"] in ("attempt", "eval", "checkpoint", *NOTABLE)]
    counted = _counted(run, wanted)
    rows = [
        [clock(line["time"]), str(line["attempt"]), f"{line['step']:,}", escaped(line["event"]), escaped(_said(line))]
        for line in counted[-MOST_ROWS:]
    ]
    last = f" (the last {MOST_ROWS})" if len(counted) > MOST_ROWS else ""
    listed = table(["time", "attempt", "step", "event", "what"], rows, "left")
    return details(plural(len(counted), "event") + last, listed)


def _counted(run: Run, lines: list[Line]) -> list[Line]:
    """Checkpoints and evaluations only where they count; attempts and faults always, for they happened."""
    valid = {id(line) for line in run.lines}
    return [line for line in lines if line["event"] not in ("eval", "checkpoint") or id(line) in valid]


def _said(line: Line) -> str:
    """A line's context in words, cut where there are very many."""
    said = _context(line)
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} …"


def _context(line: Line) -> str:
    context = line["context"]
    if line["event"] == "config":
        changed = context.get("changed", {})
        parts = [f"{k} {_change(k, v)}" for k, v in changed.items()] if isinstance(changed, dict) else []
        return "config changed: " + ", ".join(parts)
    if line["event"] == "attempt":
        ranks, stage = context.get("world_size"), context.get("zero_stage")
        where = f"on {plural(ranks, 'rank')} at ZeRO stage {stage}" if ranks else ""
        changes = " and changes" if context.get("uncommitted") else ""
        commit = f"commit {str(context['commit'])[:12]}{changes}" if "commit" in context else ""
        return ", ".join(filter(None, [where, commit, str(context.get("command_line", ""))]))
    if line["event"] == "checkpoint":
        return str(context.get("path", ""))
    if line["event"] == "eval":
        return ", ".join(f"{name} {short(value)}" for name, value in line["metrics"].items() if name != "seconds")
    kind = [str(context["kind"]).replace("_", " ")] if "kind" in context else []
    words = [str(context[k]) for k in ("message", "reason") if context.get(k)]
    rest = [f"{k} {v}" for k, v in context.items() if k not in ("kind", "message", "reason") and not is_secret(k)]
    return ": ".join([*kind, *(words or [", ".join(rest)])]) or line["event"].replace("_", " ")


def _change(key: str, values: object) -> str:
    if is_secret(key):
        return MASK
    return " → ".join(map(str, values)) if isinstance(values, list) else str(values)
