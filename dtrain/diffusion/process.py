"""The diffusion process a configuration asks for."""

from dtrain.config import Flow, Gaussian
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.schedule import named
from dtrain.diffusion.times import LogitNormal, SecondMoment, Uniform


def build(config: Gaussian | Flow) -> GaussianDiffusion | RectifiedFlow:
    """The process of the `diffusion` section. Raises UserError for a schedule that cannot be."""
    if config.process == "flow":
        return RectifiedFlow(_times(config))
    return GaussianDiffusion(
        named(config.schedule, config.timesteps, config.zero_terminal_snr),
        config.prediction,
        config.variance,
        config.loss,
        config.min_snr_gamma if config.weighting == "min_snr" else None,
        _times(config),
    )


def _times(config: Gaussian | Flow) -> Uniform | LogitNormal | SecondMoment:
    if config.times == "logit_normal":
        return LogitNormal(config.logit_normal_mean, config.logit_normal_std)
    return SecondMoment(config.timesteps) if config.times == "importance" else Uniform()
