"""A small network with random parameters that attends to words, and what it is told."""

import numpy as np
import torch

from dtrain.models.dit import DiT
from dtrain.models.mmdit import MMDiT
from dtrain.models.text import TextNetwork, TokenEncoder
from dtrain.models.unet import UNet

N, L, E = 3, 6, 24
SMALL = {"image_size": 12, "channels": 3, "patch": 2, "width": 32, "depth": 2, "heads": 4, "num_classes": 0}


def random(shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def filled(module, seed=0):
    """Float64, every parameter random."""
    module = module.double()
    for number, parameter in enumerate(module.parameters()):
        parameter.data = 0.5 * random(tuple(parameter.shape), seed + number)
    return module


def masks():
    lengths = torch.tensor([L, 1, 4])
    return torch.arange(L) < lengths[:, None]


def told_in_words(encoder=True, learned_null=True, seed=0, kind="dit"):
    """A small float64 network with random parameters that attends to the tokens of one condition, `text`."""
    model = bare(kind, cross=True)
    own = TokenEncoder(257, L, 32, 2) if encoder else None
    model.conditions["text"] = TextNetwork(own, 32 if encoder else E, model.condition_width, learned_null)
    return filled(model, seed)


def two_texts_and_a_class(depth=2):
    """A float64 MMDiT with random parameters, told `one`, `two` and a class of 4."""
    model = MMDiT(**SMALL | {"num_classes": 4, "depth": depth})
    for name in ("one", "two"):
        model.conditions[name] = TextNetwork(None, E, model.condition_width, True)
    return filled(model)


def bare(kind, cross=False):
    """A DiT, an MMDiT, or a UNet that attends at one of its two levels."""
    if kind == "mmdit":
        return MMDiT(**SMALL)
    if kind == "dit":
        return DiT(**SMALL, cross=cross)
    shape = {"image_size": 12, "channels": 3, "width": 8, "multipliers": [1, 2], "res_blocks": 1, "attention": [6]}
    return UNet(**shape, num_classes=0, head_width=4, cross=cross)


def inputs():
    return random((N, 3, 12, 12), 3), torch.tensor([0, 417, 999])


def words(encoder, seed=4):
    if encoder:
        return torch.from_numpy(np.random.default_rng(seed).integers(0, 257, (N, L)))
    return random((N, L, E), seed)
