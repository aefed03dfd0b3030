"""How many streams a data set is read in, where the config leaves it open (design, decision 1)."""

from dtrain.config import Config
from dtrain.data.manifest import Manifest
from dtrain.errors import UserError


def default_streams(samples: int) -> int:
    """One stream per 1,024 samples, at most 64."""
    return min(64, max(1, samples // 1024))


def with_streams(config: Config, manifest: Manifest) -> Config:
    """The config with data.streams resolved for this data set. Raises UserError when there are more than samples."""
    streams = config.data.streams or default_streams(manifest.samples)
    if streams > manifest.samples:
        raise UserError(f"data.streams {streams} exceeds the {manifest.samples} samples of {manifest.path}")
    return config.model_copy(update={"data": config.data.model_copy(update={"streams": streams})})
