"""A comparison of runs in MLflow: a run of its own, with their numbers as metrics and the page among its artifacts."""

import hashlib
import time
from pathlib import Path
from typing import Any

from dtrain.credentials import without_credentials
from dtrain.errors import UserError
from dtrain.tracking.mlflow.address import alone_with, milliseconds, open_client, reason
from dtrain.tracking.mlflow.keys import allowed
from dtrain.tracking.mlflow.run import METRICS_PER_BATCH
from dtrain.tracking.mlflow.sweeps import RUN_KEY

COMPARISON_OF = "dtrain.comparison_of"


def key_of(run_keys: list[str]) -> str:
    """What the comparison of these runs is found by, in any order of them."""
    return f"comparison.{hashlib.sha256('/'.join(sorted(run_keys)).encode()).hexdigest()[:32]}"


def send_comparison(
    uri: str,
    experiment: str,
    run_keys: list[str],
    params: dict[str, Any],
    runs: dict[str, tuple[dict[str, float], list[tuple[int, dict[str, float]]]]],
    files: list[Path],
) -> str:
    """Make the comparison's run, or bring it up to date; its id in MLflow.

    runs: name → its numbers, and those at each number of network evaluations. Params keep their first value. Raises
    UserError where MLflow does not take them; `files` lie in one folder.
    """
    from mlflow.entities import Metric, Param

    now = milliseconds(time.time())
    metrics = []
    for name, (own, curve) in runs.items():
        metrics += [Metric(allowed(f"{name}/{metric}"), float(value), now, 0) for metric, value in own.items()]
        for evaluations, at in curve:
            key = f"{name}/over_evaluations"
            metrics += [Metric(allowed(f"{key}/{m}"), float(value), now, evaluations) for m, value in at.items()]
    try:
        client, experiment_id = open_client(uri, experiment)
        key = key_of(run_keys)
        with alone_with(files[0].parent):
            found = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'")
            if found:
                run_id, known = found[0].info.run_id, found[0].data.params
            else:
                tags, title = {RUN_KEY: key, COMPARISON_OF: ", ".join(runs)}, f"comparison of {', '.join(runs)}"
                run_id, known = client.create_run(experiment_id, now, tags, run_name=title).info.run_id, {}
            for first in range(0, len(metrics), METRICS_PER_BATCH):
                client.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_BATCH], synchronous=True)
            missing = [Param(allowed(k), str(v)) for k, v in params.items() if allowed(k) not in known]
            client.log_batch(run_id, params=missing, synchronous=True)
            for file in files:
                client.log_artifact(run_id, str(file))
            client.set_terminated(run_id, "FINISHED", milliseconds(time.time()))
    except Exception as e:
        raise UserError(
            f"the comparison was not sent to MLflow at {without_credentials(uri)}: {reason(e)}; its page and numbers "
            "are whole, and the same command sends them again"
        ) from e
    return run_id
