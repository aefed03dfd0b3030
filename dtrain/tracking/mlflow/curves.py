"""The curves of a run in MLflow: how far each has got there, and what is refused."""

import logging
from typing import Any

from dtrain.tracking.mlflow.address import reason
from dtrain.tracking.mlflow.keys import former_key, metric_key

REFUSED = "dtrain.refused"


class Curves:
    """Metrics of MLflow run `run`, a key each. `log` and `lacks` talk to MLflow.

    refused: key → why MLflow does not take it, ever; it is kept over connections.
    """

    def __init__(self, client, run, refused: dict[str, str]):
        self._client, self._run_id = client, run.info.run_id
        self._probe = next(iter(run.data.tags.items()))
        self._refused = refused
        self.highest = {m.key: m.step for m in run.data.to_proto().metrics}  # key → highest step there
        self._former = set(self.highest)
        self._histories: dict[str, dict[int, int]] = {}  # of the keys asked for: step → milliseconds

    def key(self, line: dict[str, Any], metric: str) -> str | None:
        """The key of a journal line's metric: of a curve that began under a former name, that one; None: no curve."""
        former = former_key(line, metric)
        key = former if former in self._former else metric_key(line, metric)
        return None if key in self._refused else key

    def lacks(self, key: str, step: int, time_ms: int, model_lacks: bool) -> bool:
        """Whether an evaluation's value is not there: it may be of an older step than the newest that is.

        Also where only the run has it, because the request that should have given it to the model too was cut off.
        """
        there = self._history(key).get(step)
        return there is None or (there == time_ms and model_lacks)

    def has_hole(self, key: str, step: int) -> bool:
        """Whether a value is not there though later ones are, as in a run that was made anew in mid-training."""
        return step not in self._history(key)

    def _history(self, key: str) -> dict[int, int]:
        if key not in self._histories:
            self._histories[key] = {m.step: m.timestamp for m in self._client.get_metric_history(self._run_id, key)}
        return self._histories[key]

    def log(self, metrics: list) -> list:
        """Send one request's worth; those that are there now.

        MLflow refuses a request whole for one bad value. Then its parts are sent, and of what is refused alone the key
        is set aside and named once, in the log and in the run's tag.
        """
        taken = self._log(sorted(metrics, key=lambda metric: metric.key))
        for metric in taken:
            self.highest[metric.key] = max(metric.step, self.highest.get(metric.key, -1))
            if metric.key in self._histories:
                self._histories[metric.key][metric.step] = metric.timestamp
        return taken

    def _log(self, metrics: list) -> list:
        from mlflow.exceptions import MlflowException

        metrics = [metric for metric in metrics if metric.key not in self._refused]
        if not metrics:
            return []
        try:
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
        except MlflowException as e:
            if e.error_code != "INVALID_PARAMETER_VALUE":
                raise
            self._client.set_tag(self._run_id, *self._probe, synchronous=True)  # raises where the run takes nothing
            if len(metrics) > 1:
                half = len(metrics) // 2
                return self._log(metrics[:half]) + self._log(metrics[half:])
            self._set_aside(metrics[0].key, reason(e))
            return []
        return metrics

    def _set_aside(self, key: str, why: str) -> None:
        self._refused[key] = why
        logging.getLogger(__name__).warning("MLflow refuses %r for good, so only the journal has it: %s", key, why)
        self._client.set_tag(self._run_id, REFUSED, ", ".join(sorted(self._refused))[:5000], synchronous=True)
