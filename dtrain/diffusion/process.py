"""The diffusion process a configuration asks for."""

from dtrain.config import EDM as EDMSection
from dtrain.config import DenoisingGAN as DenoisingGANSection
from dtrain.config import Flow, Gaussian, Variational
from dtrain.config import MeanFlow as MeanFlowSection
from dtrain.diffusion.denoising_gan import DenoisingGAN, chain_of
from dtrain.diffusion.edm import EDM
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gamma import GammaDiffusion
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.mean_flow import MeanFlow
from dtrain.diffusion.schedule import named
from dtrain.diffusion.variational import VariationalDiffusion

Process = GaussianDiffusion | RectifiedFlow | EDM | VariationalDiffusion


def build(
    config: Gaussian | Flow | MeanFlowSection | EDMSection | Variational | DenoisingGANSection,
    decoder: str = "discretised",
) -> Process:
    """The process of the `diffusion` section. Raises UserError for a schedule that cannot be.

    decoder: of its bound; discretised for pixels, continuous for data without levels.
    """
    if config.process == "vdm":
        of_levels = "softmax" if decoder == "discretised" else decoder
        return VariationalDiffusion(config.gamma_min, config.gamma_max, config.timesteps, of_levels)
    if config.process == "meanflow":
        return MeanFlow()
    if config.process == "ddgan":
        return DenoisingGAN(chain_of(config.timesteps), latent=config.latent)
    if config.process == "flow":
        return RectifiedFlow(config.time_scale, config.prediction, config.least_time)
    if config.process == "edm":
        return EDM(
            config.sigma_data,
            config.sigma_min,
            config.sigma_max,
            config.rho,
            config.noise_mean,
            config.noise_std,
        )
    schedule = named(config.schedule, config.timesteps, config.zero_terminal_snr)
    if config.noise == "gamma":
        return GammaDiffusion(schedule, config.prediction, config.variance, decoder, config.theta_0)
    return GaussianDiffusion(schedule, config.prediction, config.variance, decoder)
