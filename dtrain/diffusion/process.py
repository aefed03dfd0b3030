"""The diffusion process a configuration asks for."""

from dtrain.config import Diffusion
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.schedule import linear


def build(config: Diffusion) -> GaussianDiffusion:
    """The process of the `diffusion` section. Raises UserError for a schedule that cannot be."""
    return GaussianDiffusion(linear(config.timesteps), config.prediction)
