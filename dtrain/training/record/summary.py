"""What a finished run says: its curve, where the pictures are, how to open MLflow."""

import math
from pathlib import Path

from dtrain.credentials import without_credentials
from dtrain.run import RunDirectory
from dtrain.tracking.history import History
from dtrain.tracking.mlflow import curves_link, problem, server_command, tracking_uri

BAR = 40  # characters


def summary(path: Path) -> str:
    """Text for the terminal: the evaluation curve as bars, the newest grid, the page of the curves in MLflow."""
    run = RunDirectory(path)
    history = History.read(run.journal_file)
    evaluations = history.counting("eval")
    lines = []
    if evaluations:
        metric = next(iter(evaluations[-1]["metrics"]), "seconds")
        context = evaluations[-1]["context"]
        curve = [(e["step"], e["metrics"][metric]) for e in evaluations if metric in e["metrics"]]
        top = max([value for _, value in curve if math.isfinite(value)], default=0.0)
        walked = f", {context.get('steps')} {context['sampler']} steps" if "sampler" in context else ""
        lines.append(f"{metric} of {context.get('ema')}, {context.get('n')} samples{walked}")
        lines += [f"  step {s:>8}  {v:>9.4f}  {_bar(v, top)}".rstrip() for s, v in curve]
        if "artifact" in context:
            lines.append(f"sample grid: {run.path / context['artifact']}")
    if failed := sorted({e["step"] for e in history.counting("eval_failed")} - {e["step"] for e in evaluations}):
        lines.append(f"evaluations that failed: of step {', '.join(map(str, failed))}; the journal says why")
    config = run.config()
    if not config.tracking.enabled:
        return "\n".join(lines)
    return "\n".join(lines + in_mlflow(run))


def in_mlflow(run: RunDirectory) -> list[str]:
    """Where the run's curves are, or why they are not there."""
    link, command, lacking = curves_link(run), server_command(run), problem(run)
    place = without_credentials(tracking_uri(run, run.config().tracking))
    if link is None:
        if lacking is None and "://" not in place:
            return [f"curves in MLflow: {place}"]  # such as `databricks`
        why = lacking or "it has not answered"
        return [f"nothing of this run is in MLflow at {place}: {why}", f"  send it with: dtrain sync {run.path}"]
    lines = [f"curves in MLflow: {command}", f"  then open {link}"] if command else [f"curves in MLflow: {link}"]
    lines.append("  if it shows no curves, choose *Model training* at the top left")
    if lacking is not None:
        lines.append(f"  a part is not there yet ({lacking}); send it with: dtrain sync {run.path}")
    return lines


def _bar(value: float, top: float) -> str:
    """Against the greatest value; none where a bar would say nothing: of what is not finite, or not above 0."""
    return "█" * max(1, round(BAR * value / top)) if math.isfinite(value) and 0 < value <= top else ""
