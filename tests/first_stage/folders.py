"""Autoencoders of a few thousand random weights, in folders that diffusers itself has written."""

import json
from pathlib import Path

from tests.digits import tiny

PICTURES = {"in_channels": 1, "out_channels": 1}  # grey, as the digits


def save_kl(folder: Path, seed: int = 0, **options) -> Path:
    """An AutoencoderKL of two levels, so that two pixels of a side become one. None of config.json: taken out of it."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    given = {key: value for key, value in options.items() if value is not None}
    torch.manual_seed(seed)
    AutoencoderKL(
        **PICTURES
        | {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "latent_channels": 4,
        }
        | given
    ).save_pretrained(folder)
    return without(folder, [key for key, value in options.items() if value is None])


def save_tiny(folder: Path, seed: int = 0, **options) -> Path:
    """An AutoencoderTiny of the same shape."""
    import torch
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    torch.manual_seed(seed)
    blocks = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8))
    blocks |= dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), (1, 1))
    AutoencoderTiny(**PICTURES | blocks | options).save_pretrained(folder)
    return folder


def without(folder: Path, keys: list[str]) -> Path:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in tree.items() if key not in keys}))
    return folder


def latent(digits: Path, folder: Path, source: Path, *overrides: str):
    """`tests.digits.tiny` in latents of 4 × 4."""
    return tiny(digits, folder, f"first_stage={{kind: kl, source: {source}}}", *overrides)
