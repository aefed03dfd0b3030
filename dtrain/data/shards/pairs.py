"""What pairs of noise and samples were drawn from, as their manifest says."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=1 << 63)]


class Pairs(BaseModel):
    """A run's weights, and all that decided its samples."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    checkpoint: str
    """its hash, with that of a weaker model where guidance led away from one"""
    weights: str
    """which of the checkpoint: raw, ema_0, …"""
    process: str
    first_stage: str
    """fingerprint of what is between pixels and x_0"""
    shape: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    """(C, H, W) of x_0"""
    sampling: dict[str, Any]
    """the settings of the samples; seed and generator of the noise are in each sample too"""
    generator: Positive
