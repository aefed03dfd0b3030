"""Where a run's curves are seen in a browser: the ids that MLflow gave it, kept in the run directory."""

import json
from contextlib import suppress
from pathlib import Path

from dtrain.credentials import without_credentials
from dtrain.files import read_bytes, read_json
from dtrain.run import RunDirectory, replace
from dtrain.tracking.mlflow.address import tracking_uri

FILE = "mlflow.json"  # {"uri", "experiment", "run"} of the store that has the run; "problem": why it lacks something
# MLflow 3.17 opens experiments in its GenAI mode, which hides curves; this parameter chooses the other one.
MODEL_TRAINING = "workflowType=machine_learning"
LOCAL_SERVER = "http://127.0.0.1:5000"  # where `mlflow server` listens by default


def keep_ids(directory: Path, uri: str, experiment_id: str, run_id: str) -> None:
    """Write down which run of MLflow this is, so that its link needs no network."""
    _keep(directory, {"uri": without_credentials(uri), "experiment": experiment_id, "run": run_id})


def keep_problem(directory: Path, uri: str, problem: str) -> None:
    """Write down why the store does not have everything, beside the ids that it gave, if it has."""
    known = _known(directory, without_credentials(uri))
    _keep(directory, {"uri": without_credentials(uri)} | known | {"problem": problem})


def curves_link(run: RunDirectory) -> str | None:
    """The page of the run's curves; None as long as the store that the run is tracked in has not answered.

    For a database it is the page that `server_command` serves.
    """
    uri = without_credentials(tracking_uri(run, run.config().tracking))
    ids = _known(run.path, uri)
    if not {"run", "experiment"} <= ids.keys():
        return None
    if uri.startswith(("http://", "https://")):
        server = uri.rstrip("/")
    elif "://" in uri:
        server = LOCAL_SERVER
    else:
        return None  # such as `databricks`, whose address is not known here
    return f"{server}/{run_page(ids['experiment'], ids['run'])}"


def run_page(experiment_id: str, run_id: str) -> str:
    """The address, within the server, of a run's curves."""
    return f"#/experiments/{experiment_id}/runs/{run_id}/model-metrics?{MODEL_TRAINING}"


def server_command(run: RunDirectory) -> str | None:
    """What serves the run's database, to be opened at `curves_link`; None where a server is there already."""
    uri = without_credentials(tracking_uri(run, run.config().tracking))
    return f"mlflow server --backend-store-uri {uri}" if "://" in uri and not uri.startswith("http") else None


def problem(run: RunDirectory) -> str | None:
    """Why MLflow does not have all of the run, as far as is known, free of credentials."""
    return _known(run.path, without_credentials(tracking_uri(run, run.config().tracking))).get("problem")


def _known(directory: Path, uri: str) -> dict[str, str]:
    """What is kept of this store; nothing of another, as of a run that was copied or has got another server."""
    try:
        kept = read_json(directory / FILE)
    except (OSError, ValueError):
        return {}
    texts = isinstance(kept, dict) and all(isinstance(value, str) for value in kept.values())
    return kept if texts and kept.get("uri") == uri else {}


def _keep(directory: Path, kept: dict[str, str]) -> None:
    text, file = json.dumps(kept) + "\n", directory / FILE
    with suppress(OSError):  # a full disk: curves are worth more than the link to them, and the next sync writes it
        if not file.is_file() or read_bytes(file) != text.encode():
            replace(file, text)
