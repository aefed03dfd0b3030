"""Where a run's metrics go in the tests of MLflow."""

from pathlib import Path

from dtrain.tracking.mlflow import Destination, default_uri

EXPERIMENT = "digits"


def destination(run: Path, **changed) -> Destination:
    """The SQLite store beside the run, or with these fields changed."""
    whole = {
        "journal_path": run / "journal.jsonl",
        "uri": default_uri(run),
        "experiment": EXPERIMENT,
        "run_name": run.name,
        "run_key": f"key-of-{run.name}",
        "params": {"model.width": 96, "optim.lr": 1e-3},
        "tags": {"git.commit": "abc"},
    }
    return Destination(**whole | changed)
