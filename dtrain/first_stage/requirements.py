"""What a first stage needs: that its folder, the config and the data fit each other. Without torch, for who only asks.

A latent cache is used for none but the autoencoder, the size, the crop and the range that it was made of (design,
decision 11).
"""

import hashlib
import math
import os
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dtrain.config import Config
from dtrain.config.autoencoders import LEFT_OVER, WEIGHTS, Normalisation, described
from dtrain.config.parts import KL
from dtrain.data.shards.latents import RANGE, Latents
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import UserError, from_where
from dtrain.files import opener, read_json

FAR = 2.0  # times 1: a deviation of normalised latents from which the scale is said to be another's


def encoder(source: str, precision: str, block: int) -> dict[str, Any]:
    """All that decides which moments a picture has: the folder's files by sha256, and how they are computed with.

    Raises UserError where they are not there.
    """
    weights, config = (_digest(Path(source) / name) for name in (WEIGHTS, "config.json"))
    return {"weights": weights, "config": config, "precision": precision, "block": block}


def encoder_of(section: KL) -> dict[str, Any]:
    return encoder(section.source, section.precision, section.block)


def check(config: Config, manifest: Manifest) -> None:
    """Raises UserError where the first stage's folder, the config and the data do not fit."""
    section, data = config.first_stage, config.data
    for one in (manifest, *manifest.mixed):
        if one.latents is not None and not section.reads_cache:
            raise UserError(
                f"{one.path} is a latent cache and holds no pictures; set first_stage.kind=kl, first_stage.cached=true "
                "and first_stage.source to the folder that it was made with"
            )
    if not isinstance(section, KL):
        return
    found = described(section.source)
    for key, ours, theirs in (
        ("first_stage.latent_channels", section.latent_channels, found.channels),
        ("first_stage.downscale", section.downscale, found.downscale),
        ("data.channels", data.channels, found.in_channels),
        ("data.channels", data.channels, found.out_channels),
    ):
        if ours != theirs:
            raise UserError(f"{key} is {ours}, and {section.source} has {theirs}; name another first_stage.source")
    own = encoder_of(section)
    if section.cached:
        for one in (manifest, *manifest.mixed):
            _check_cache(config, one, own)
    normalisation(config, manifest)


def _check_cache(config: Config, one: Manifest, own: dict[str, Any]) -> None:
    if one.latents is None:
        raise UserError(
            f"first_stage.cached: {one.path} is of no latent cache; make one with: "
            f"{command(config, one.path.parent, 'DEST')}"
        )
    _check_made(config, one.latents, own, one.path)


def _check_made(config: Config, made: Latents, own: dict[str, Any], path: Path) -> None:
    """Raises UserError where latents, or their statistics, were made of something else than the config's."""
    data, section = config.data, config.first_stage
    for what, theirs, key, ours in (
        ("an autoencoder whose weights have sha256", made.weights, section.source, own["weights"]),
        ("an autoencoder whose config.json has sha256", made.config, section.source, own["config"]),
        ("precision", made.precision, "first_stage.precision", own["precision"]),
        ("blocks of", made.block, "first_stage.block", own["block"]),
        ("pictures of size", made.size, "data.image_size", data.image_size),
        ("pictures of channels", made.channels, "data.channels", data.channels),
        ("crop", made.crop, "data.crop", data.crop),
        ("scaling", made.scaling, "data.scaling", data.scaling),
        ("exif", made.exif, "data.exif", data.exif),
        ("pixels in", made.range, "what the autoencoder is given", RANGE),
        ("latents of shape", tuple(made.shape), "the network's", config.shape),
    ):
        if theirs != ours:
            shown = [v[:12] if isinstance(v, str) else v for v in (theirs, ours)]
            raise UserError(f"{path} was made with {what} {shown[0]}, and {key} has {shown[1]}; encode the data again")
    if len(made.mean) != made.shape[0] or len(made.deviation) != made.shape[0]:
        raise UserError(f"{path} has no mean and deviation for each of its {made.shape[0]} channels; encode again")
    if data.flip and made.mirrors == 1:
        raise UserError(
            f"data.flip: {path} is of pictures without their mirrors, and the latent of a mirrored picture is not the "
            "mirrored latent; encode again with --mirrors, or set data.flip=false"
        )


def normalisation(config: Config, manifest: Manifest | None) -> Normalisation:
    """Of the config's kl first stage, by what the folder, the cache or the file of statistics says.

    Of several caches, as they are mixed. Raises UserError where it is not known.
    """
    section = config.first_stage
    if section.normalise == "published":
        return described(section.source).published
    if section.cached:
        parts = [one.latents for one in (manifest, *manifest.mixed) if one.latents is not None]
        return mixed(parts, _weights(config))
    wanted = command(config, config.data.shards, "STATISTICS.json", "--statistics-only")
    if manifest.mixed:
        raise UserError("first_stage.normalise dataset of several data sets needs caches of them: `dtrain encode`")
    if section.statistics is None:
        raise UserError(
            f"first_stage.normalise dataset without a cache needs the statistics of {manifest.path}; make them with: "
            f"{wanted}; and name the file in first_stage.statistics"
        )
    made = read_statistics(section.statistics)
    _check_made(config, made, encoder_of(section), Path(section.statistics))
    if made.source != manifest.hash:
        raise UserError(f"{section.statistics} is of another data set than {manifest.path}; make it with: {wanted}")
    return Normalisation(tuple(made.mean), tuple(made.deviation))


def mixed(parts: list[Latents], weights: list[float]) -> Normalisation:
    """Mean and deviation of a mixture: E[z] and √(E[z²] − E[z]²), channel by channel."""
    if len(parts) == 1:
        return Normalisation(tuple(parts[0].mean), tuple(parts[0].deviation))
    whole = sum(weights)
    columns = list(zip(*(zip(part.mean, part.deviation, strict=True) for part in parts), strict=True))
    means = [sum(w * m for w, (m, _) in zip(weights, channel, strict=True)) / whole for channel in columns]
    variances = [
        sum(w * (d * d + (m - mean) ** 2) for w, (m, d) in zip(weights, channel, strict=True)) / whole
        for channel, mean in zip(columns, means, strict=True)
    ]
    return Normalisation(tuple(means), tuple(math.sqrt(v) for v in variances))


def _weights(config: Config) -> list[float]:
    return [config.data.weight, *(source.weight for source in config.data.mix)]


def read_statistics(path: str | Path) -> Latents:
    """What `dtrain encode --statistics-only` wrote. Raises UserError."""
    again = "make it again with `dtrain encode --statistics-only`"
    try:
        tree = read_json(path)
        if not isinstance(tree, dict) or tree.get("format") != 1:
            raise ValueError("it has another format")
        return Latents.model_validate(tree.get("latents"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}{from_where(path)}, which first_stage.statistics names; {again}") from None
    except ValidationError as e:
        where = ".".join(map(str, e.errors()[0]["loc"])) or "the whole file"
        raise UserError(f"{path} holds no statistics ({where}: {e.errors()[0]['msg']}); {again}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}; {again}") from None


def command(config: Config, pictures: str | Path, destination: str, *more: str) -> str:
    """The `dtrain encode` that makes what this config needs of these pictures."""
    section, data = config.first_stage, config.data
    words = ["dtrain", "encode", str(pictures), destination, *more, "--first-stage", section.source]
    words += ["--size", str(data.image_size)]
    words += ["--mirrors"] if data.flip else []
    words += ["--precision", section.precision] if section.precision != "fp32" else []
    words += ["--scaling", data.scaling] if data.scaling != "bicubic" else []
    words += ["--block", str(section.block)] if section.block != 1 else []
    return shlex.join(words)


def about(config: Config, manifest: Manifest) -> list[str]:
    """Lines about a published scale that may be another autoencoder's."""
    section = config.first_stage
    if not isinstance(section, KL) or section.normalise != "published":
        return []
    found, lines = described(section.source), []
    if not found.scale_is_said and found.kind == "AutoencoderKL":
        lines.append(f"{section.source}: config.json names no scaling_factor, so diffusers' {LEFT_OVER} is taken")
    caches = [one.latents for one in (manifest, *manifest.mixed) if one.latents is not None]
    if caches:
        deviation = mixed(caches, _weights(config)).deviation
        scaled = [ours / theirs for ours, theirs in zip(deviation, found.published.deviation, strict=True)]
        lines += about_scale(section, math.sqrt(sum(s * s for s in scaled) / len(scaled)))
    return lines


def about_scale(section: KL, deviation: float) -> list[str]:
    """A line about normalised latents of this deviation, where that is far from 1."""
    if 1 / FAR <= deviation <= FAR:
        return []
    found = described(section.source)
    left = " (what every new AutoencoderKL has until another is set)" if found.scaling_factor == LEFT_OVER else ""
    return [
        f"the latents have deviation {deviation:.3g} and not about 1 by {section.source}'s own scaling_factor "
        f"{found.scaling_factor:g}{left}; first_stage.normalise=dataset scales each channel to 1"
    ]


def _digest(path: Path) -> str:
    try:
        status = os.stat(path)
        return _digest_of(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino)
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}{from_where(path)}, which first_stage.source needs; save it with diffusers' "
            "save_pretrained(safe_serialization=True)"
        ) from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


@lru_cache(maxsize=16)
def _digest_of(path: str, size: int, changed: int, inode: int) -> str:
    """Read once a process for each version of a file: a start compares it in several places."""
    with open(path, "rb", opener=opener) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
