"""What a finished run says: its curve, where the pictures are, how to open MLflow."""

import math
from pathlib import Path

from dtrain.credentials import without_credentials
from dtrain.run import RunDirectory
from dtrain.tracking.journal import read as read_journal
from dtrain.tracking.tracker import tracking_uri

BAR = 40  # characters


def summary(path: Path) -> str:
    """Text for the terminal: the evaluation curve as bars, the newest grid, the command that opens MLflow."""
    run = RunDirectory(path)
    evaluations = [e for e in read_journal(run.journal_file) if e["event"] == "eval"]
    lines = []
    if evaluations:
        metric = next(iter(evaluations[-1]["metrics"]))
        context = evaluations[-1]["context"]
        curve = [(e["step"], e["metrics"][metric]) for e in evaluations if metric in e["metrics"]]
        top = max([value for _, value in curve if math.isfinite(value)], default=0.0)
        lines.append(
            f"{metric} of {context['ema']}, {context['n']} samples, {context['steps']} {context['sampler']} steps"
        )
        lines += [f"  step {s:>8}  {v:>9.4f}  {_bar(v, top)}".rstrip() for s, v in curve]
        if "artifact" in context:
            lines.append(f"sample grid: {run.path / context['artifact']}")
    config = run.config()
    if not config.tracking.enabled:
        return "\n".join(lines)
    uri = without_credentials(tracking_uri(run, config))
    opens = f"mlflow server --backend-store-uri {uri}" if "://" in uri and not uri.startswith("http") else uri
    lines.append(f"curves in MLflow: {opens}")
    return "\n".join(lines)


def _bar(value: float, top: float) -> str:
    """Against the greatest value; none where a bar would say nothing: of what is not finite, or not above 0."""
    return "█" * max(1, round(BAR * value / top)) if math.isfinite(value) and 0 < value <= top else ""
