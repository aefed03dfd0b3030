"""What a sweep goes through: all combinations of checkpoints, weights and sampler settings. Imports no torch."""

import itertools
from typing import Any

from dtrain import config as configuration
from dtrain.checkpoint.directory import complete, step_of
from dtrain.config import Config
from dtrain.config.guidance import chosen_over
from dtrain.errors import UserError
from dtrain.run import RunDirectory

Setting = dict[str, Any]
AXES = ("checkpoint", "ema", "guidance", "eta", "steps", "seed")  # from what changes least while sampling
OPTION_OF = {"checkpoint": "checkpoints", "seed": "seeds"}  # of `dtrain sweep`, where it is not called as its axis


def combinations(axes: dict[str, list]) -> list[Setting]:
    """Every choice of one value an axis; an axis that is not named stays as the run has it."""
    names = [name for name in AXES if axes.get(name)]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(axes[n] for n in names))]


def checkpoints_of(run: RunDirectory, wanted: str) -> list[int]:
    """The steps that `all` or `1000,2000` stands for. Raises UserError for one that is not there."""
    there = [step_of(path) for path in complete(run.checkpoints)]
    if wanted == "all":
        return there
    parts = wanted.split(",")
    found = [int(part) for part in parts if part.strip().isdecimal()]
    if len(found) < len(parts) or not set(found) <= set(there):
        raise UserError(f"--checkpoints {wanted}: {run.path} has {', '.join(map(str, there)) or 'none'}; or say `all`")
    return found


def configured(config: Config, setting: Setting) -> Config:
    """The run's config at a combination. Raises UserError for a value that its key cannot have."""
    tree = config.model_dump(mode="json")
    chosen = {key: value for key, value in setting.items() if key != "checkpoint"}
    if isinstance(weights := chosen.get("ema"), str):
        kind, _, width = weights.partition("_")
        chosen["ema"] = {"sigma_rel": width} if kind == "sigma" else None if kind == "raw" else weights
    tree["eval"] = chosen_over(tree["eval"], chosen)
    return configuration.validate(tree, "the command line", [f"eval.{key}" for key in chosen])
