"""The backbone a configuration asks for."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dtrain import config as configuration
from dtrain.config import Config, Section, Text
from dtrain.config.conditions import VOCABULARY, Picture
from dtrain.models.adapted import Adapted, adapted_layers
from dtrain.models.control import Controlled, DiTCopy, UNetCopy
from dtrain.models.dit import DiT
from dtrain.models.kl_autoencoder import KLAutoencoder
from dtrain.models.layers import LatentEmbedder, SpanEmbedder, initialize, xavier_uniform
from dtrain.models.mmdit import MMDiT
from dtrain.models.text import TextNetwork, TokenEncoder
from dtrain.models.unet import UNet


def build(config: Config) -> nn.Module:
    """The model of the `model` section, with the initial weights of `run.seed`.

    float32 on the current default device; under `torch.device("meta")` it holds no weights.
    """
    backbone = allocate(config)
    initialize(backbone, config.run.seed)
    return backbone


def allocate(config: Config) -> DiT | MMDiT | UNet | KLAutoencoder | Controlled | Adapted:
    """The model of `build`, its weights not yet written: for those who write them otherwise.

    One that stands on frozen weights has yet to be given them (`checkpoint.frozen_base.allocate_whole`).
    """
    if config.model.name == "kl_autoencoder":
        return _kl_autoencoder(config.model, config.data.channels)
    if config.pictures:
        base = config.base
        copies = {name: _copy(base, section, config.data) for name, section in config.pictures.items()}
        return Controlled(copies)
    if getattr(config.model, "adapt", None):
        return _adapted(config)
    return _backbone(config)


def _adapted(config: Config) -> Adapted:
    with torch.device("meta"):
        layers = {n: (one.in_features, one.out_features) for n, one in adapted_layers(_backbone(config.base))}
    rank, alpha = config.model.adapt.rank, config.model.adapt.alpha
    return Adapted(layers, rank, rank if alpha is None else alpha)


def _copy(base: Config, section: Picture, data: configuration.Data) -> DiTCopy | UNetCopy:
    kind = UNetCopy if base.model.name == "unet" else DiTCopy
    return _backbone(base, kind, picture=(section.channels(data.channels), data.image_size))


def _backbone(config: Config, kind: type | None = None, **more) -> DiT | MMDiT | UNet:
    """kind: a class made of the backbone's, with what it takes beside the sizes."""
    learn_sigma = getattr(config.diffusion, "variance", None) == "learned_range"
    allocated, words = _BACKBONES[config.model.name], bool(config.texts)
    backbone = allocated(config.model, config.shape, learn_sigma, words, *([kind] if kind else []), **more)
    if config.diffusion.process == "meanflow":
        own = backbone.t_embedder
        backbone.t_embedder = SpanEmbedder(backbone.condition_width, own.frequencies, own.shift)
    if config.diffusion.process == "ddgan":
        own, width = backbone.t_embedder, backbone.condition_width
        backbone.t_embedder = LatentEmbedder(width, config.diffusion.latent, own.frequencies, own.shift)
        backbone.initial_value = partial(_apart, backbone.initial_value)
    for name, section in config.conditions.items():
        if (network := _network(section, backbone.condition_width)) is not None:
            backbone.conditions[name] = network
    return backbone


def _apart(initial_value: Callable[..., Tensor], name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """What a parameter begins as where samples must differ from the start: nothing that sees x_t or z begins as 0.

    All samples of a network that began as 0 would be pulled the same way by the critic, and stay one.
    """
    value = initial_value(name, shape, seed)
    if len(shape) > 1 and (name.startswith("t_embedder.latent.") or not value.any()):
        return xavier_uniform(name, shape, seed)
    return value


def _network(section: Section, width: int) -> nn.Module | None:
    """The part of a backbone of this width that a condition has."""
    if not isinstance(section, Text):
        return section.network(width)
    own = TokenEncoder(VOCABULARY, section.length, section.width, section.depth) if section.trained else None
    return TextNetwork(own, section.width, width, section.null == "learned")


def _dit(
    model: configuration.DiT, shape: tuple[int, int, int], learn_sigma: bool, cross: bool, kind: type = DiT, **more
) -> DiT:
    channels, side, _ = shape
    return kind(
        side,
        channels,
        num_classes=model.num_classes,
        learn_sigma=learn_sigma,
        qk_norm=model.qk_norm,
        frequency_shift=model.frequency_shift,
        cross=cross,
        norm=model.norm,
        mlp=model.mlp,
        rotary=model.positions == "rotary",
        bottleneck=model.patch_bottleneck,
        context_tokens=model.context_tokens,
        context_from=model.first_with_context,
        fourier=model.fourier,
        **model.sizes,
        **more,
    )


def _mmdit(model: configuration.MMDiT, shape: tuple[int, int, int], learn_sigma: bool, words: bool) -> MMDiT:
    channels, side, _ = shape
    return MMDiT(side, channels, num_classes=model.num_classes, learn_sigma=learn_sigma, **model.sizes)


def _kl_autoencoder(model: configuration.KLAutoencoder, channels: int) -> KLAutoencoder:
    widths = [model.width * multiplier for multiplier in model.multipliers]
    return KLAutoencoder(channels, widths, model.res_blocks, model.latent_channels, model.attention)


def _unet(
    model: configuration.UNet, shape: tuple[int, int, int], learn_sigma: bool, cross: bool, kind: type = UNet, **more
) -> UNet:
    sizes = model.model_dump(exclude={"name", "control_of", "adapt"})
    channels, side, _ = shape
    return kind(side, channels, learn_sigma=learn_sigma, cross=cross, **sizes, **more)


_BACKBONES = {"dit": _dit, "mmdit": _mmdit, "unet": _unet}
