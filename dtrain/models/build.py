"""The backbone a configuration asks for."""

from torch import nn

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.models.dit import SIZES, DiT
from dtrain.models.layers import initialize


def build(config: Config) -> nn.Module:
    """The model of the `model` section, for the images of the `data` section, with the initial weights of `run.seed`.

    float32 on the current default device; under `torch.device("meta")` it holds no weights.
    Raises UserError for sizes that do not fit each other.
    """
    backbone = allocate(config)
    initialize(backbone, config.run.seed)
    return backbone


def allocate(config: Config) -> nn.Module:
    """The model of `build`, its weights not yet written: for those who write them otherwise."""
    model, image_size = config.model, config.data.image_size
    size = dict(SIZES[model.size]) if model.size else {}
    size |= {k: v for k in ("depth", "width", "heads", "patch") if (v := getattr(model, k)) is not None}
    if size["width"] % size["heads"]:
        raise UserError(f"model.width {size['width']} must be a multiple of model.heads {size['heads']}")
    if image_size % size["patch"]:
        raise UserError(f"data.image_size {image_size} does not divide into patches of model.patch {size['patch']}")
    return DiT(image_size, config.data.channels, num_classes=model.num_classes, **size)
