"""A folder of diffusers' AutoencoderKL or AutoencoderTiny, as its config.json describes it. Imports no torch, reads no
weights.

    x_0 = (z − mean) / deviation        z = mean + deviation · x_0

is what all ways to state a scale come to (`Normalisation`).
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.config.folders import config_json
from dtrain.errors import UserError

KINDS = ("AutoencoderKL", "AutoencoderTiny")
WEIGHTS = "diffusion_pytorch_model.safetensors"
EXPORTED = "autoencoder"  # in the directory of a run that trained one: where its export is looked for
LEFT_OVER = 0.18215  # Stable Diffusion's scaling_factor, which every new AutoencoderKL has until another is set


class Normalisation(NamedTuple):
    """Of each channel of a latent: what is taken away, and what the rest is divided by."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


@dataclass(frozen=True)
class Autoencoder:
    """What config.json says of it. channels: of a latent. downscale: pixels of a side that become one."""

    kind: str
    in_channels: int
    out_channels: int
    channels: int
    downscale: int
    published: Normalisation
    scale_is_said: bool  # whether config.json names a scale; where it does not, diffusers' default holds
    scaling_factor: float


def described(folder: str | Path) -> Autoencoder:
    """Raises UserError where the folder is none of an autoencoder that can be used."""
    path = Path(folder) / "config.json"
    tree = config_json(folder, "an autoencoder", _instead(Path(folder)))
    if not isinstance(tree, dict) or tree.get("_class_name") not in KINDS:
        kind = tree.get("_class_name") if isinstance(tree, dict) else None
        raise UserError(f"{path} describes {kind or 'no model of diffusers'}; take a folder of {' or '.join(KINDS)}")
    try:
        return _of(tree)
    except (TypeError, ValueError) as e:
        raise UserError(f"{path} describes no {tree['_class_name']} that can be used: {e}") from None


def _instead(folder: Path) -> str:
    """What to do where the folder has no config.json."""
    for inner in (folder / "vae", folder / EXPORTED):
        if (inner / "config.json").is_file():
            return f"take {inner}"
    if (folder / "config.yaml").is_file():
        out = str(folder / EXPORTED)
        words = ("dtrain", "checkpoints", "export", str(folder), "--ema", "0", "--format", "diffusers", "--out", out)
        return f"if it is a run that trained one, export that with: {shlex.join(words)}; and take {out}"
    return "name a folder that diffusers has saved"


def _of(tree: dict[str, Any]) -> Autoencoder:
    """Defaults are those of the classes. Raises TypeError and ValueError."""
    tiny = tree["_class_name"] == "AutoencoderTiny"
    channels = _count(tree, "latent_channels", 4)
    levels = tree.get("num_encoder_blocks", [1, 3, 3, 3]) if tiny else tree.get("block_out_channels", [64])
    if tiny and tree.get("upsampling_scaling_factor", 2) != 2:
        raise ValueError("its upsampling_scaling_factor is not 2, so what it decodes has another size")
    scaling, shift = _number(tree, "scaling_factor", 1.0 if tiny else LEFT_OVER), _number(tree, "shift_factor", 0.0)
    mean, deviation = [shift] * channels, [1 / scaling] * channels
    if tree.get("latents_mean") is not None or tree.get("latents_std") is not None:
        if shift:
            raise ValueError("it names a shift_factor and latents_mean, of which only one can hold")
        mean, std = _numbers(tree, "latents_mean", channels, 0.0), _numbers(tree, "latents_std", channels, 1.0)
        deviation = [value / scaling for value in std]
    if not all(value > 0 for value in deviation):
        raise ValueError("its scale is not above 0")
    return Autoencoder(
        tree["_class_name"],
        _count(tree, "in_channels", 3),
        _count(tree, "out_channels", 3),
        channels,
        2 ** (len(levels) - 1),
        Normalisation(tuple(mean), tuple(deviation)),
        any(tree.get(key) is not None for key in ("scaling_factor", "latents_std")),
        scaling,
    )


def _count(tree: dict[str, Any], key: str, default: int) -> int:
    value = tree.get(key, default)
    if type(value) is not int or not 0 < value < 1 << 16:
        raise ValueError(f"{key} is {value!r}")
    return value


def _number(tree: dict[str, Any], key: str, default: float) -> float:
    value = default if tree.get(key) is None else tree[key]
    if type(value) not in (int, float) or not abs(value) < 1e6 or (key == "scaling_factor" and not value > 0):
        raise ValueError(f"{key} is {value!r}")
    return float(value)


def _numbers(tree: dict[str, Any], key: str, channels: int, default: float) -> list[float]:
    values = [default] * channels if tree.get(key) is None else tree[key]
    if not isinstance(values, list) or len(values) != channels:
        raise ValueError(f"{key} has not one number for each of {channels} channels")
    return [_number({key: value}, key, default) for value in values]
