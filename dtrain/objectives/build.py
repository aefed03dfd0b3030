"""The objective a configuration asks for."""

from dtrain.config import Flow, Gaussian
from dtrain.diffusion import process
from dtrain.diffusion.times import LogitNormal, SecondMoment, Uniform
from dtrain.objectives.denoising import Denoising


def build(config: Gaussian | Flow) -> Denoising:
    """The way of training that the `diffusion` section describes. Raises UserError for a schedule that cannot be."""
    if config.process == "flow":
        return Denoising(process.build(config), times=_times(config))
    gamma = config.min_snr_gamma if config.weighting == "min_snr" else None
    return Denoising(process.build(config), config.loss, gamma, _times(config))


def _times(config: Gaussian | Flow) -> Uniform | LogitNormal | SecondMoment:
    if config.times == "logit_normal":
        return LogitNormal(config.logit_normal_mean, config.logit_normal_std)
    return SecondMoment(config.timesteps) if config.times == "importance" else Uniform()
