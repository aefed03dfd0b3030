"""The first stage a configuration asks for."""

from typing import Any

import torch

from dtrain.config import Config
from dtrain.config.autoencoders import Normalisation
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import UserError
from dtrain.first_stage import requirements
from dtrain.first_stage.pixels import FirstStage, Pixels

DECODE_BATCH = 8  # latents that are decoded together, unless eval.decode_batch says otherwise


def build(config: Config, manifest: Manifest | None, device: torch.device) -> FirstStage:
    """Of a training on this data: pixels, an autoencoder, or what a plug-in's section builds. Raises UserError.

    manifest: of what is trained on; None where the latents' scale does not follow from it.
    """
    own = requirements.normalisation(config, manifest) if config.first_stage.kind == "kl" else None
    found = _built(config, own, device)
    if manifest is not None and config.is_coupled:
        for one in (manifest, *manifest.mixed):
            if one.pairs is not None and one.pairs.first_stage != found.fingerprint:
                raise UserError(
                    f"{one.path} holds pairs of another first stage (fingerprint {one.pairs.first_stage[:12]} there, "
                    f"{found.fingerprint[:12]} here); take the first_stage of the run that drew them"
                )
    return found


def of_checkpoint(config: Config, stated: Any, device: torch.device) -> FirstStage:
    """The one that a checkpoint's weights were trained with, as `statement` gave it. Raises UserError for another."""
    own = None
    if config.first_stage.kind == "kl":
        try:
            own = Normalisation(*(tuple(map(float, stated[key])) for key in ("mean", "deviation")))
        except (TypeError, KeyError, ValueError):
            raise UserError(
                "this checkpoint does not tell how the latents were scaled that it was trained on"
            ) from None
    found = _built(config, own, device)
    check(found, stated)
    return found


def statement(first_stage: FirstStage) -> dict[str, Any]:
    """What a checkpoint says of it, as plain data; nothing of pixels."""
    if isinstance(first_stage, Pixels):
        return {}
    scale = getattr(first_stage, "normalisation", None)
    return {"fingerprint": first_stage.fingerprint} | ({} if scale is None else scale._asdict())


def check(first_stage: FirstStage, stated: Any) -> None:
    """Raises UserError where a checkpoint, as its `statement` says, was trained with another first stage."""
    theirs = stated.get("fingerprint") if isinstance(stated, dict) else None
    if theirs not in (None, first_stage.fingerprint):
        raise UserError(
            f"it was trained with another first stage (fingerprint {str(theirs)[:12]} there, "
            f"{first_stage.fingerprint[:12]} here): another file of weights, config.json, precision, block or scale; "
            "name the right folder in first_stage.source"
        )


def _built(config: Config, normalisation: Normalisation | None, device: torch.device) -> FirstStage:
    section = config.first_stage
    if section.kind == "pixels":
        return Pixels()
    if section.kind != "kl":
        return section.build(config)
    from dtrain.first_stage.autoencoder import load
    from dtrain.first_stage.kl import KL

    autoencoder = load(section.source, section.precision, device)
    decoded = config.eval.decode_batch or DECODE_BATCH
    encoder = requirements.encoder_of(section)
    return KL(autoencoder, encoder, normalisation, section.cached, section.block, decoded)
