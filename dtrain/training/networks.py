"""Several networks of one player as the single module that DeepSpeed takes."""

from collections.abc import Mapping

from torch import nn


class Networks(nn.Module):
    """Several networks as one module, which DeepSpeed takes for a model: forward(network, *arguments)."""

    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        self.networks = nn.ModuleDict(networks)

    def forward(self, network: str, *args, **kwargs):
        return self.networks[network](*args, **kwargs)
