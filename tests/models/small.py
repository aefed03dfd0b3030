"""A DiT small enough to compare in full."""

from dtrain.models.dit import DiT
from dtrain.models.layers import initialize

SIZES = {"channels": 3, "patch": 2, "width": 32, "depth": 2, "heads": 4, "num_classes": 5}


def small(seed=0, image_size=8, **changes):
    """Initialised from the seed; `changes` of SIZES."""
    model = DiT(image_size, **SIZES | changes)
    initialize(model, seed)
    return model
