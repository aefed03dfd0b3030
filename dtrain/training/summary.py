"""What a finished run says: its curve, where the pictures are, how to open MLflow."""

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
        top = max(value for _, value in curve)
        lines.append(
            f"{metric} of {context['ema']}, {context['n']} samples, {context['steps']} {context['sampler']} steps"
        )
        lines += [f"  step {s:>8}  {v:>9.4f}  {'█' * max(1, round(BAR * v / top))}" for s, v in curve]
        if "artifact" in context:
            lines.append(f"sample grid: {run.path / context['artifact']}")
    config = run.config()
    if not config.tracking.enabled:
        return "\n".join(lines)
    uri = without_credentials(tracking_uri(run, config))
    opens = f"mlflow server --backend-store-uri {uri}" if "://" in uri and not uri.startswith("http") else uri
    lines.append(f"curves in MLflow: {opens}")
    return "\n".join(lines)
