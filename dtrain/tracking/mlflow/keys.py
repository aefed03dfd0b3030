"""What metrics and pictures are called in MLflow, and so in which order its pages show them.

MLflow 3.17 makes a section of charts of each key's part before its last "/", and sorts sections and charts by name. A
run is judged by its distance and its loss, so these come first, and what tells of the machine comes after them:

    eval/ema_0/n2000/fd_pixels, …/samples     the distance, and the pictures it was measured on
    train/loss, train/grad_norm, train/lr     and whatever else an objective reports
    train/levels/loss_level_0, …
    train/speed/images_per_second, …
    validation/loss_level_0, …

Goodput, and how long a checkpoint and an evaluation took, are no curves: totals are tags of the run, the rest is in the
journal. A run whose curves have other names in MLflow goes on under these, because a renamed key splits its curve.
"""

import hashlib
import posixpath
import re
from pathlib import PurePosixPath
from typing import Any

LONGEST_KEY = 250  # MLflow's limit
LONGEST_IMAGE_KEY = 120  # it becomes a part of a file's name
LONGEST_LIST = 40  # characters of a list that a key still holds as it is
SPEED = {"images_per_second", "step_seconds", "step_seconds_spread", "data_wait_seconds", "bytes_read"}
SPEED |= {"tflops", "mfu", "mfu_nominal", "peak_memory_gib"}
COUNTS = {"bad_samples", "captions_truncated"}  # no curve as long as they stand at 0
NO_CURVES = {"goodput", "checkpoint"}  # events
FORMER_IMAGE_KEY = "samples"  # under which the pictures of all evaluations were once one series


def metric_key(line: dict[str, Any], metric: str) -> str | None:
    """The MLflow key of one metric of a journal line; None where it is no curve.

    An evaluation's key holds EMA and N, which no curve may mix, and what it changed of the run's own settings.
    """
    event, context = line["event"], line["context"]
    if event == "eval":
        return None if metric == "seconds" else allowed(_section(context) + metric)
    if event == "system":
        return allowed(f"system/{context.get('node')}/{metric}")
    if event in NO_CURVES or (metric in COUNTS and not line["metrics"][metric]):
        return None
    if event == "train" and metric in SPEED:
        return f"train/speed/{metric}"
    if event == "train" and metric.startswith("loss_level_"):
        return f"train/levels/{metric}"
    return allowed(f"{event}/{metric}")


def former_key(line: dict[str, Any], metric: str) -> str:
    """What the metric's key was before keys were put into the order above."""
    event, context = line["event"], line["context"]
    if event == "eval":
        differs = "".join(f"{k}-{v}/" for k, v in context.get("differs", {}).items())
        return _characters(f"eval/{context.get('ema')}/n{context.get('n')}/{differs}{metric}")
    return _characters(f"system/{context.get('node')}/{metric}" if event == "system" else f"{event}/{metric}")


def image_key(line: dict[str, Any], name: str = "samples") -> str:
    """The key of the picture that an evaluation's line names: in the section of its distance."""
    key = re.sub(r"[^a-zA-Z0-9_\-. /]", "_", _section(line["context"]) + name)
    return _cut(_as_a_path(key), LONGEST_IMAGE_KEY)


def allowed(key: str) -> str:
    """A key that MLflow takes: it refuses a whole batch for one with another character, a path's dots or too long."""
    return _cut(_as_a_path(_characters(key)), LONGEST_KEY)


def _section(context: dict[str, Any]) -> str:
    differs = "".join(f"{k}-{_value(v)}/" for k, v in context.get("differs", {}).items())
    return f"eval/{context.get('ema')}/n{context.get('n')}/{differs}"


def _value(value: Any) -> str:
    """A setting's value in a key: of a path its last part, of a long list its length, and a hash of the whole."""
    text = str(value)
    if isinstance(value, str) and "/" in value:
        return f"{PurePosixPath(value).name}-{_hash(text)}"
    if isinstance(value, list) and len(text) > LONGEST_LIST:
        return f"{len(value)} values-{_hash(text)}"
    return text


def _characters(key: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", key)


def _as_a_path(key: str) -> str:
    if posixpath.normpath(key) == key and not key.startswith(("/", "..")) and key != ".":
        return key
    return "/".join("_" if part in (".", "..") else part for part in key.split("/") if part) or "_"


def _cut(key: str, longest: int) -> str:
    return key if len(key) <= longest else f"{key[: longest - 9]}-{_hash(key)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
