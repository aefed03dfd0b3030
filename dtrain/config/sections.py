"""What all sections of a configuration are made of. One file a family beside this one; each refuses what cannot be
combined within it.

A string below a key says what the key does: `dtrain config` reads it from there (`dtrain.config.keys`).
"""

import os
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_serializer,
)

from dtrain import addresses
from dtrain.credentials import value_without_credentials

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
# A file, a folder or a URL. `~` is the home of whoever starts: no shell expands it in a file, or after `key=`. The
# login and the query of a URL go to whoever opens it (`dtrain.addresses`); a config does without.
Place = Annotated[str, AfterValidator(os.path.expanduser), AfterValidator(addresses.kept)]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of a tree of plain data; lists become one line of YAML."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            out[f"{prefix}{key}"] = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
        else:
            out[f"{prefix}{key}"] = value
    return out


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=False)

    def identity_keys(self) -> list[str]:
        """The keys that a run may not change once it has trained."""
        return []

    @model_serializer(mode="wrap")
    def _as_kept(self, serialize: Any, info: Any) -> dict[str, Any]:
        """As JSON, which is what config.yaml, checkpoints and MLflow have, without the commands of `pipe:`."""
        tree = serialize(self)
        if info.mode == "json":
            return {k: value_without_credentials(v) if isinstance(v, str) else v for k, v in tree.items()}
        return tree


class IdentitySection(Section):
    """A section all of whose keys a run keeps."""

    def identity_keys(self) -> list[str]:
        return list(type(self).model_fields)


class PartSection(IdentitySection):
    """The section of a first stage, a condition or an objective, which says what it needs of every row of a batch.

    A plug-in's has `build(config)` too, which gives the part itself.
    """

    diffuses: ClassVar[bool] = True  # of an objective: whether it draws a time and noise for each row

    def fields(self, config: Any) -> list[Any]:
        """Files of each sample beside the picture: `dtrain.data.fields.field.Field`s."""
        return []

    def draws(self, config: Any) -> list[Any]:
        """Random numbers of each row beside `time` and `noise`: `dtrain.draws.Draw`s."""
        return []

    @property
    def file_of_weights(self) -> str | None:
        """The user's file with the weights of a frozen network that an objective computes with; None: there is none."""
        return None

    @property
    def further_forwards(self) -> int:
        """Forwards of each row without a gradient that an objective adds in training to those of the process."""
        return 0

    def network(self, width: int) -> Any | None:
        """The part of the backbone that makes a vector (N, width) of a condition; None where it has none."""
        return None
