"""The run's configuration: one pydantic tree, read from a YAML file and `key.sub=value` overrides.

    config = load("configs/digits-dit.yaml", ["optim.lr=1e-3"])

Unknown keys are refused with the nearest known one. `${NAME}` in a string is the environment variable NAME.
"""

from dtrain.config.averages import EMAProfile
from dtrain.config.conditions import Text
from dtrain.config.data import ArrayField, Data, Source
from dtrain.config.diffusion import EDM, DenoisingGAN, Flow, Gaussian, MeanFlow, Variational
from dtrain.config.earlier import with_earlier_values
from dtrain.config.evaluation import FEATURES, SAMPLERS, Eval, Sampling
from dtrain.config.models import DiT, KLAutoencoder, MMDiT, UNet
from dtrain.config.parts import FirstStageSection
from dtrain.config.reading import continued, load, load_kept, read_tree, validate
from dtrain.config.run import Run, Tracking
from dtrain.config.sections import PartSection, Section, flat
from dtrain.config.training import DeepSpeed, Optim, Train
from dtrain.config.tree import Config, architecture, identity

__all__ = [
    "EDM",
    "FEATURES",
    "SAMPLERS",
    "ArrayField",
    "Config",
    "Data",
    "DeepSpeed",
    "DenoisingGAN",
    "DiT",
    "EMAProfile",
    "Eval",
    "FirstStageSection",
    "Flow",
    "Gaussian",
    "KLAutoencoder",
    "MMDiT",
    "MeanFlow",
    "Optim",
    "PartSection",
    "Run",
    "Sampling",
    "Section",
    "Source",
    "Text",
    "Tracking",
    "Train",
    "UNet",
    "Variational",
    "architecture",
    "continued",
    "flat",
    "identity",
    "load",
    "load_kept",
    "read_tree",
    "validate",
    "with_earlier_values",
]
