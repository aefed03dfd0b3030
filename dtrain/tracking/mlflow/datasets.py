"""Data sets as MLflow's own: in a run's Datasets, and in the runs table's column and filter of that name."""

import json
from typing import Any

DIGEST = 12  # characters of the manifest's hash; MLflow takes 36 and shows them all
CONTEXT = "mlflow.data.context"


class Datasets:
    """The data sets of MLflow run `run`. `log` talks to MLflow."""

    def __init__(self, client, run):
        self._client, self._run_id = client, run.info.run_id
        inputs = run.inputs.dataset_inputs if run.inputs else []
        self._there = {(one.dataset.name, one.dataset.digest) for one in inputs}

    def log(self, datasets: list[dict[str, Any]], context: str) -> None:
        """Those that are not there yet; each has name, hash, source and, where they are known, samples.

        context: what for, "training" or "evaluation".
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        found = {}
        for one in datasets:
            at = (one["name"][-500:], one["hash"][:DIGEST])
            if at in self._there:
                continue
            source = json.dumps({"uri": one["source"]})
            profile = json.dumps({"num_rows": one["samples"]}) if "samples" in one else None
            found[at] = DatasetInput(
                Dataset(*at, source_type="local", source=source, profile=profile), [InputTag(CONTEXT, context)]
            )
        if found:
            self._client.log_inputs(self._run_id, list(found.values()))
            self._there |= found.keys()
