"""Our models with weights everywhere, and diffusers' classes that they are exported to."""

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

from dtrain.models.dit import DiT

CLASSES = {"transformer": DiTTransformer2DModel, "unet": UNet2DModel}


def randomised(model):
    """The model with every parameter random, also those that are initialised to zero."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name == "pos_embed":
            p.data = DiT.initial_value(name, tuple(p.shape), 0)
        elif p.dim() == 1:
            p.data = ("norm" in name and "weight" in name) + 0.1 * torch.randn(p.shape, generator=generator)
        else:
            p.data = torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5
    return model.eval()
