"""The `run` and `tracking` sections: its name, its folder, its MLflow server."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dtrain import addresses
from dtrain.config.sections import Place, Section


def _name_of_a_folder(value: str | None) -> str | None:
    if value is not None and not value.strip("."):
        raise ValueError(f"{value!r} is a place and no name")
    return value


def _at_home(uri: str | None) -> str | None:
    """A SQLite file below `~` at the home of whoever starts."""
    place = (uri or "").removeprefix("sqlite:///")
    return f"sqlite:///{os.path.expanduser(place)}" if place.startswith("~") else uri


def _without_login(uri: str | None) -> str | None:
    return uri and addresses.kept(uri)


class Run(Section):
    init_from: Place | None = None
    """begin with the weights of another run: its directory, name, one checkpoint, or a file of weights"""
    init_weights: Literal["ema", "model"] | None = None
    """which of them: averaged or raw; null: a run's raw ones, or those of a file that holds one set"""
    name: Annotated[str | None, AfterValidator(_name_of_a_folder)] = Field(None, pattern=r"^[\w.\-]+$", max_length=255)
    """the run lies in runs/NAME; null: the config file's name without .yaml"""
    dir: Place = "runs"
    """the folder that holds the runs"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """of the initial weights, the order of the samples and all random draws"""
    generator: Literal[1, 2] = 2
    """how noise is made of random words. 2: the same bits on every device; 1: as runs before it did, on CPUs"""

    def identity_keys(self) -> list[str]:
        return ["seed", "generator"]

    @model_validator(mode="after")
    def _begins_with(self):
        if self.init_weights and not self.init_from:
            raise ValueError(
                f"init_weights {self.init_weights} chooses among the weights of init_from; name them there"
            )
        return self

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


class Tracking(Section):
    enabled: bool = True
    """false: only the journal is written; `dtrain sync` sends it later, from where MLflow is"""
    uri: Annotated[str | None, AfterValidator(_at_home), AfterValidator(_without_login)] = Field(
        default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI") or None, validate_default=True
    )
    """MLflow's address; default: MLFLOW_TRACKING_URI, else SQLite beside the runs"""
    experiment: str = Field("dtrain", min_length=1, max_length=500)
    """of MLflow, where the run is listed"""
    system_every: Annotated[float, Field(ge=0)] = 30.0
    """seconds between looks at a node's CPU, memory, GPUs and their energy; 0: none"""
    carbon_intensity: Annotated[float, Field(gt=0)] | None = None
    """g of CO₂ that a kWh makes where the run is, for the report; null: not told"""
