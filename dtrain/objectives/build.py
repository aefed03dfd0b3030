"""The objective a configuration asks for."""

from collections.abc import Callable
from dataclasses import replace

from dtrain.batch import Condition
from dtrain.conditions.build import build as build_conditions
from dtrain.config import EDM, Config, Flow, Gaussian, MeanFlow, Variational
from dtrain.diffusion import process
from dtrain.diffusion.times import LogitNormal, One, SecondMoment, Uniform
from dtrain.errors import UserError
from dtrain.objectives.autoencoding import Autoencoding
from dtrain.objectives.denoising import Denoising
from dtrain.objectives.denoising_gan import AgainstCritic
from dtrain.objectives.distillation import Distillation, Read
from dtrain.objectives.gamma import GammaDenoising
from dtrain.objectives.mean_flow import BuiltIn, MeanVelocity
from dtrain.objectives.objective import Objective
from dtrain.objectives.one_step import PerceptualOneStep
from dtrain.objectives.uncertainty import UncertainDenoising
from dtrain.objectives.variational import VariationalBound, beginning


def build(config: Config, read_teacher: Read | None = None) -> Objective:
    """What the `objective` section names; denoising by the `diffusion` section.

    read_teacher: of a distillation, for a training. Raises UserError for a schedule that cannot be.
    """
    objective, diffusion = config.objective, config.diffusion
    if diffusion.process == "ddgan" and objective.diffuses:
        made = process.build(diffusion)
        return AgainstCritic(made, diffusion, config.shape, config.model.num_classes, config.optim)
    if objective.kind in ("denoising", "distillation"):
        decoder = "continuous" if config.first_stage.is_continuous else "discretised"
        null = build_conditions(config).null
        made = denoising(config.diffusion, decoder, null)
        return made if objective.kind == "denoising" else Distillation(made, objective, null, read_teacher)
    if objective.kind == "autoencoding":
        width = config.model.width * config.model.multipliers[0]
        return Autoencoding(objective, config.data.channels, width, config.optim)
    return objective.build(config)


def denoising(
    config: Gaussian | Flow | MeanFlow | EDM | Variational,
    decoder: str = "discretised",
    null: Callable[[Condition], Condition] | None = None,
) -> Denoising | PerceptualOneStep | MeanVelocity | VariationalBound:
    """Denoising as the `diffusion` section describes it. Raises UserError for a schedule that cannot be.

    decoder: of the bound; continuous for data that are not 8-bit pixels. null: of a condition, what the same rows are
    told where nothing is said; for guidance that is built in.
    """
    if config.process == "vdm":
        made = process.build(config, decoder)
        if config.schedule == "linear":
            return VariationalBound(made)
        return VariationalBound(replace(made, curve=beginning()), config.schedule_lr_factor)
    if config.process == "meanflow":
        times, guidance = LogitNormal(config.logit_normal_mean, config.logit_normal_std), None
        if config.guidance != 1:
            if null is None:
                raise UserError(f"diffusion.guidance {config.guidance:g} is of objective.kind denoising; take 1")
            guidance = BuiltIn(config.guidance, config.guidance_mix, config.guidance_from, null)
        how = config.span_share, config.along, config.weight_power
        return MeanVelocity(process.build(config), times, *how, guidance)
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
