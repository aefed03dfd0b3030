"""What the first page of a run in MLflow says of it: the headline distance, where to look on, where the time went."""

import math
from collections.abc import Iterable
from typing import Any

from dtrain.config import guidance
from dtrain.tracking.best import better, made_alike
from dtrain.tracking.journal import valid

NOTE = "mlflow.note.content"
YOURS = "*dtrain keeps the lines above up to date; those below this one are yours.*"
KINDS = {"productive_s": "steps", "evaluation_s": "evaluations", "data_wait_s": "waiting for data"}
KINDS |= {"restart_s": "starts", "save_stall_s": "saving", "bad_step_s": "refused steps"}


class Landmarks:
    """What of a journal tells how its run stands: its own evaluations that count, and the totals of every attempt."""

    def __init__(self):
        self.evaluations: list[dict[str, Any]] = []
        self._failed: list[dict[str, Any]] = []
        self.totals: dict[int, dict[str, float]] = {}  # attempt → metrics of its newest "goodput" line

    def add(self, lines: list[dict[str, Any]], begun: list[dict[str, Any]]) -> None:
        """begun: the "attempt" lines so far, by which earlier ones may have become void."""
        evaluations = [line for line in lines if line["event"] == "eval"]
        self.evaluations = valid(self.evaluations + evaluations, begun)
        self._failed = valid(self._failed + [line for line in lines if line["event"] == "eval_failed"], begun)
        self.totals |= {line["attempt"]: line["metrics"] for line in lines if line["event"] == "goodput"}

    @property
    def failure(self) -> dict[str, Any] | None:
        """The newest evaluation, where it failed."""
        newest = max((line["step"] for line in self.evaluations), default=-1)
        return next((line for line in reversed(self._failed) if line["step"] > newest), None)


def headline(evaluations: Iterable[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """(metric, line) of what the run is judged by: the first metric of its newest evaluation."""
    newest = max(evaluations, key=lambda line: line["step"], default=None)
    if newest is None:
        return None
    metric = next((name for name in newest["metrics"] if name != "seconds"), None)
    return None if metric is None else (metric, newest)


def description(landmarks: Landmarks, links: dict[str, str]) -> str:
    """Markdown. links: text → address."""
    lines = [distance(landmarks.evaluations) or "No evaluation yet."]
    if failure := landmarks.failure:
        lines.append(f"The evaluation of step {failure['step']:,} failed: {failure['context'].get('message', '')}")
    lines.append(" · ".join(f"[{text}]({address})" for text, address in links.items()))
    if landmarks.totals:
        lines.append(f"Time: {goodput(landmarks.totals.values())}.")
    return "\n\n".join(lines)


def distance(evaluations: list[dict[str, Any]]) -> str | None:
    """The newest value with N and step, and the best one made in the same way."""
    found = headline(evaluations)
    if found is None:
        return None
    metric, line = found
    context, value = line["context"], line["metrics"][metric]
    said = f"**{metric} {value:.4g}** at step {line['step']:,} ({line['images']:,} images seen)"
    alike = [e for e in made_alike(evaluations, line, metric) if math.isfinite(e["metrics"][metric])]
    best = better(metric)(alike, key=lambda other: other["metrics"][metric], default=line)
    if best["metrics"][metric] == value:
        said += ", the best so far"
    elif best is not line:
        said += f", the best so far {best['metrics'][metric]:.4g} at step {best['step']:,}"
    how = []
    if "sampler" in context:
        how += [str(context["sampler"]), f"{context.get('steps')} steps"]
    if context.get("guidance", 1.0) != 1.0:
        how.append(f"guidance {guidance.shown(context['guidance'])}")
    n = context.get("n")
    said += f". Measured on {f'{n:,}' if isinstance(n, int) else n} samples of {context.get('ema')}"
    said += f" ({', '.join(how)})." if how else "."
    if "bpd" in line["metrics"]:
        said += f" bpd is with x_0 {'clipped to [−1, 1]' if context.get('bpd_clip') else 'not clipped'}."
    return said


def goodput(totals: Iterable[dict[str, float]]) -> str:
    """Over all attempts: the share of each kind of time, and what was lost."""
    total: dict[str, float] = {}
    for metrics in totals:
        for name, value in metrics.items():
            total[name] = total.get(name, 0.0) + value
    wall = total.get("wall_s", 0.0)
    shares = [f"{text} {100 * total.get(kind, 0.0) / wall:.0f} %" for kind, text in KINDS.items()] if wall else []
    counts = f"{total.get('lost_steps', 0):.0f} steps lost, {total.get('refused_images', 0):.0f} images refused"
    return f"{wall / 60:,.1f} min: {', '.join([*shares, counts])}"


def merged(ours: str, there: str | None) -> str:
    """The description with what a user wrote kept: all that does not stand above our line."""
    theirs = there or ""
    if YOURS in theirs:
        theirs = theirs.partition(YOURS)[2]
    return f"{ours}\n\n{YOURS}\n\n{theirs.strip()}".rstrip() + "\n"
