"""The diffusion process a configuration asks for."""

from dtrain.config import Flow, Gaussian
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.schedule import named


def build(config: Gaussian | Flow, decoder: str = "discretised") -> GaussianDiffusion | RectifiedFlow:
    """The process of the `diffusion` section. Raises UserError for a schedule that cannot be.

    decoder: of its bound; see `GaussianDiffusion`.
    """
    if config.process == "flow":
        return RectifiedFlow(config.time_scale, config.prediction, config.least_time)
    return GaussianDiffusion(
        named(config.schedule, config.timesteps, config.zero_terminal_snr),
        config.prediction,
        config.variance,
        decoder,
    )
