"""What MLflow gets of a run beside its curves, from the config and the journal: params, tags, data sets."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.config import Config, Data, Eval, flat
from dtrain.credentials import MASK, value_without_credentials

if TYPE_CHECKING:
    from dtrain.data.shards.manifest import Manifest

NAMING = {"optim.lr"}  # what a run is called by whether or not it is the default
# No params even where they differ from the defaults: where a run lies and how it is carried out; what is a property of
# the data; and how it is measured, which stands beside each distance.
CARRIED_OUT = ("run.name", "run.dir", "data.shards", "data.manifest", "data.mix", "data.holdout", "data.workers")
CARRIED_OUT += ("data.cache", "data.on_error", "data.max_bad_fraction", "data.streams", "data.allow_pipe", "tracking")
CARRIED_OUT += ("deepspeed.zero_stage", "deepspeed.offload", "deepspeed.extra", "train.micro_batch", "train.log_every")
CARRIED_OUT += ("train.checkpoint_every", "train.keep", "train.hang_limit", "train.start_limit", "train.deadline")
CARRIED_OUT += ("train.compile", "train.activation_checkpointing")
CARRIED_OUT += ("eval", "data.channels", "model.num_classes", "model.frequency_shift")


def params(lines: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """What names the run and what differs from the defaults, about 10 to 15 keys, each as the run began with it.

    MLflow prints all params of a run above each of its pictures: with many, the picture is not seen. The whole config
    is an artifact.
    """
    whole = flat(config.model_dump(mode="json"))
    chosen = NAMING | flat(config.model_dump(mode="json", exclude_defaults=True)).keys()
    first: dict[str, Any] = {}
    for line in lines:
        if line["event"] == "config":
            for key, (was, _) in line["context"].get("changed", {}).items():
                first.setdefault(key, was)
    values = whole | first
    return {k: values[k] for k in sorted(chosen | first.keys()) if k in values and not k.startswith(CARRIED_OUT)}


def trained_on(manifest: "Manifest", data: Data) -> list[dict[str, Any]]:
    """For the journal's "attempt" line: name, hash, source and samples of every data set that the run trains on."""
    found = []
    for one, source in zip((manifest, *manifest.mixed), (data, *data.mix), strict=True):
        name = dataset_name(source.shards) if source is data else source.name
        place = value_without_credentials(source.shards)
        found.append({"name": name, "hash": one.hash, "source": place, "samples": one.samples})
    return found


def datasets(lines: list[dict[str, Any]], data: Data) -> list[dict[str, Any]]:
    """What the newest attempt trains on, as `trained_on` wrote it into the journal."""
    last = next((line["context"] for line in reversed(lines) if line["event"] == "attempt"), None)
    if last is None or "datasets" in last or data.mix:
        return (last or {}).get("datasets", [])
    # A journal of an earlier version has one hash for all together.
    place = value_without_credentials(data.shards)
    return [{"name": dataset_name(place), "hash": last.get("data", ""), "source": place}]


def reference(e: Eval, data: Data) -> dict[str, Any] | None:
    """Name and source of what evaluations measure against, where that is not what the run trains on."""
    given = e.reference or data.holdout
    if given is None:
        return None
    place = Path(given).parent if Path(given).name == "manifest.json" else Path(given)
    return {"name": dataset_name(str(place)), "source": value_without_credentials(given)}


def dataset_name(place: str) -> str:
    """The last two parts of a folder or an address, such as `digits/train`."""
    place = value_without_credentials(place).removesuffix(f"?{MASK}")
    return "/".join(place.rstrip("/").split("://")[-1].split("/")[-2:])


def tags(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The data set, the code, each attempt, and what the config has been changed to since the params were set."""
    attempts = [line for line in lines if line["event"] == "attempt"]
    if not attempts:
        return {}
    last = attempts[-1]["context"]
    found = {
        "dtrain.data": last.get("data"),
        "dtrain.attempts": len(attempts),
        "mlflow.user": last.get("user"),
        "mlflow.source.name": last.get("command"),
        "mlflow.source.type": "JOB" if "job" in last else "LOCAL",
        "mlflow.source.git.commit": last.get("commit"),
    }
    for line in attempts:
        context = line["context"]
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(line["time"]))
        where = f"{context.get('world_size')} ranks, ZeRO {context.get('zero_stage')}, {context.get('host')}"
        job = f", job {context['job']}" if "job" in context else ""
        code = f", commit {context['commit'][:12]}" if "commit" in context else ""
        code += " and changes" if context.get("uncommitted") else ""
        found[f"dtrain.attempt.{line['attempt']}"] = f"from step {line['step']}, {began}, {where}{job}{code}"
    for line in lines:
        if line["event"] == "config":
            for key, (was, now) in line["context"].get("changed", {}).items():
                found[f"dtrain.changed.{key}"] = f"{was} → {now} at step {line['step']}"
    return {key: value for key, value in found.items() if value is not None}
