"""The first stage a configuration asks for."""

from dtrain.config import Config
from dtrain.first_stage.pixels import FirstStage, Pixels


def build(config: Config) -> FirstStage:
    """Pixels, or what a plug-in's section builds."""
    return Pixels() if config.first_stage.kind == "pixels" else config.first_stage.build(config)
