"""The objective a configuration asks for."""

from dataclasses import replace

from dtrain.config import EDM, Config, Flow, Gaussian, MeanFlow, Variational
from dtrain.diffusion import process
from dtrain.diffusion.times import LogitNormal, One, SecondMoment, Uniform
from dtrain.objectives.autoencoding import Autoencoding
from dtrain.objectives.denoising import Denoising
from dtrain.objectives.gamma import GammaDenoising
from dtrain.objectives.mean_flow import MeanVelocity
from dtrain.objectives.objective import Objective
from dtrain.objectives.one_step import PerceptualOneStep
from dtrain.objectives.uncertainty import UncertainDenoising
from dtrain.objectives.variational import VariationalBound, beginning


def build(config: Config) -> Objective:
    """What the `objective` section names; denoising by the `diffusion` section.

    Raises UserError for a schedule that cannot be.
    """
    objective = config.objective
    if objective.kind == "denoising":
        return denoising(config.diffusion, "continuous" if config.first_stage.is_continuous else "discretised")
    if objective.kind == "autoencoding":
        width = config.model.width * config.model.multipliers[0]
        return Autoencoding(objective, config.data.channels, width, config.optim)
    return objective.build(config)


def denoising(
    config: Gaussian | Flow | MeanFlow | EDM | Variational, decoder: str = "discretised"
) -> Denoising | PerceptualOneStep | MeanVelocity | VariationalBound:
    """Denoising as the `diffusion` section describes it. Raises UserError for a schedule that cannot be.

    decoder: of the bound; continuous for data that are not 8-bit pixels.
    """
    if config.process == "vdm":
        made = process.build(config, decoder)
        if config.schedule == "linear":
            return VariationalBound(made)
        return VariationalBound(replace(made, curve=beginning()), config.schedule_lr_factor)
    if config.process == "meanflow":
        times = LogitNormal(config.logit_normal_mean, config.logit_normal_std)
        return MeanVelocity(process.build(config), times, config.span_share, config.along, config.weight_power)
    if config.process == "edm":
        return (UncertainDenoising if config.uncertainty == "learned" else Denoising)(process.build(config))
    if config.process == "flow":
        if config.perceptual is not None:
            return PerceptualOneStep(process.build(config), config.perceptual)
        return Denoising(process.build(config), times=_times(config))
    gamma = config.min_snr_gamma if config.weighting == "min_snr" else None
    kind = GammaDenoising if config.noise == "gamma" else Denoising
    return kind(process.build(config, decoder), config.loss, gamma, _times(config))


def _times(config: Gaussian | Flow) -> Uniform | LogitNormal | SecondMoment | One:
    if config.times == "logit_normal":
        return LogitNormal(config.logit_normal_mean, config.logit_normal_std)
    if config.times == "one":
        return One()
    return SecondMoment(config.timesteps) if config.times == "importance" else Uniform()
