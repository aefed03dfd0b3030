"""Each checkpoint as a logged model, so that "best by Fréchet distance" is a click on a column of MLflow's table."""

import re
from pathlib import Path
from typing import Any

STEP, HASH, PATH, KEPT = "dtrain.step", "dtrain.hash", "dtrain.path", "dtrain.kept"


class Models:
    """The logged models of MLflow run `run_id`, by step. Every method but `metrics_of` talks to MLflow."""

    def __init__(self, client, experiment_id: str, run_id: str, run_name: str, checkpoints: Path):
        self._client, self._experiment, self._run_id, self._checkpoints = client, experiment_id, run_id, checkpoints
        self._name = re.sub(r"[^\w\- ]", "-", run_name)  # what MLflow allows
        self.look()

    def look(self) -> None:
        """Read which models there are, and leave one a step."""
        self._models: dict[int, Any] = {}
        self._metrics: dict[int, set[str]] = {}  # step → keys that its model holds
        client, token = self._client, None
        while True:
            page = client.search_logged_models(
                [self._experiment], f"source_run_id = '{self._run_id}'", page_token=token
            )
            for model in sorted(page, key=lambda m: -len(m.metrics or [])):
                step = int(model.tags.get(STEP, -1))
                if step in self._models:
                    client.delete_logged_model(model.model_id)  # made by a request whose answer was lost
                elif step >= 0:
                    self._models[step] = model
                    self._metrics[step] = {m.key for m in model.metrics or []}
            token = page.token
            if not token:
                break

    def add(self, line: dict[str, Any]) -> bool:
        """The model of a "checkpoint" line; whether it is new. Of a checkpoint saved again, the last one's hash."""
        from mlflow.entities import LoggedModelStatus
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

        step, context = line["step"], line["context"]
        tags = {
            STEP: str(step),
            HASH: context.get("hash", ""),
            PATH: str((self._checkpoints / context.get("path", "")).absolute()),
            KEPT: "yes",
            MLFLOW_MODEL_IS_EXTERNAL: "true",  # its files stay where they are
        }
        known = self._models.get(step)
        if known is not None:
            if known.tags.get(HASH) != tags[HASH]:
                self._client.set_logged_model_tags(known.model_id, tags)
                known.tags.update(tags)
            return False
        params = {"step": str(step), "images": str(line["images"]), "ema": "; ".join(context.get("ema", []))}
        created = self._client.create_logged_model(
            self._experiment,
            name=f"{self._name} step {step:08d}",
            source_run_id=self._run_id,
            tags=tags,
            params=params,
            model_type="diffusion",
        )
        self._models[step] = self._client.finalize_logged_model(created.model_id, LoggedModelStatus.READY)
        self._metrics[step] = set()
        self.mark_removed()
        return True

    def mark_removed(self) -> None:
        """Say of models whose checkpoint the run's rule has deleted that it is gone; their metrics stay."""
        for model in self._models.values():
            if model.tags.get(KEPT) == "yes" and not Path(model.tags[PATH]).is_dir():
                self._client.set_logged_model_tags(model.model_id, {KEPT: "no"})
                model.tags[KEPT] = "no"

    def id_of(self, step: int) -> str | None:
        model = self._models.get(step)
        return model.model_id if model is not None else None

    def lacks(self, step: int, key: str) -> bool:
        """Whether there is a model of this step and it has no such metric."""
        return step in self._models and key not in self._metrics[step]

    def has(self, step: int, key: str) -> None:
        """Take note that the metric has been sent with the model's id."""
        if step in self._metrics:
            self._metrics[step].add(key)
