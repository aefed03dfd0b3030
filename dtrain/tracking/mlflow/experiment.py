"""What is preset of an experiment's pages, so that they open on distances: its kind and a view of its runs."""

import json
import time
from contextlib import suppress

from dtrain.tracking.mlflow.link import MODEL_TRAINING

KIND, CUSTOM = "mlflow.experimentKind", "custom_model_development"
PRIMARY = "mlflow.experiment.primaryMetric.name"
VIEW_ID = "dtrain-distances"
VIEW = f"mlflow.sharedViewState.{VIEW_ID}"  # as MLflow 3.17 keeps a saved view: a name and the page's state as JSON
VIEW_NAME = "Distances"
LOSS = "train/loss"


def preset(client, experiment_id: str, key: str | None) -> None:
    """Say what the experiment is and put `key`, a run's headline distance, among the columns of its view.

    What a user chose stays. Every part is a convenience: a server that refuses it, as to a user without the right, is
    not asked again before the next start.
    """
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):
        there = client.get_experiment(experiment_id).tags
        wanted = {KIND: there.get(KIND, CUSTOM)}
        if key is not None:
            wanted |= {PRIMARY: there.get(PRIMARY, key), VIEW: _view(there.get(VIEW), key)}
        for name, value in wanted.items():
            if there.get(name) != value:
                client.set_experiment_tag(experiment_id, name, value)


def runs_page(experiment_id: str) -> str:
    """The address, within the server, of the experiment's runs with their distances as columns."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW_ID}&{MODEL_TRAINING}"


def _view(there: str | None, key: str) -> str:
    """The view with a column for `key`; as it is where it has one, or is not as this version of dtrain makes it."""
    column, now = f"metrics.`{key}`", round(1000 * time.time())
    if there is None:
        state = {"selectedColumns": [column, f"metrics.`{LOSS}`"]}
        view = {"name": VIEW_NAME, "createdAt": now, "updatedAt": now}
    else:
        try:
            view = json.loads(there)
            state = json.loads(view["state"])
            columns = state["selectedColumns"]
        except (ValueError, KeyError, TypeError):
            return there  # saved anew by a user, and compressed
        if column in columns:
            return there
        state["selectedColumns"] = [column, *columns]
        view["updatedAt"] = now
    return json.dumps(view | {"state": json.dumps(state)})
