"""What a latent cache was made of, as its manifest says: whoever trains on it compares each part with what it has."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
RANGE = [-1.0, 1.0]  # of the pixels that an autoencoder is given


class Latents(BaseModel):
    """The pictures, the autoencoder and how it was used, and statistics of what came of it.

    mean, deviation: float64, of each channel of the posterior samples of all mirrors, E[μ] and √(Var[μ] + E[σ²]).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: Sha256
    """hash of the manifest of the pictures"""
    weights: Sha256
    """of the autoencoder's file"""
    config: Sha256
    """of its config.json"""
    size: Positive
    """side of the pictures in pixels"""
    channels: Literal[1, 3]
    """of the pictures"""
    crop: Literal["centre"]
    scaling: Literal["bicubic", "adm"]
    exif: Literal["apply"]
    range: Annotated[list[float], Field(min_length=2, max_length=2)]
    precision: Literal["fp32", "bf16"]
    block: Positive
    dtype: Literal["float32", "float16"]
    mirrors: Literal[1, 2]
    """1: of each picture as it is; 2: of its mirror too"""
    shape: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    """(C, h, w) of a latent"""
    mean: Annotated[list[float], Field(min_length=1)]
    deviation: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
