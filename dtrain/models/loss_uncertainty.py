"""How large the loss of each noise level is, learned beside the backbone (Karras et al. 2024, EDM2, section 2.1)."""

import torch
from torch import Tensor, nn

from dtrain.models.layers import timestep_embedding

WAVES = 32
SLOWER = 100  # times that a network is told run to 1000: the fastest wave has one and a half periods


class LossUncertainty(nn.Module):
    """u of what the backbone is told of times, float32 (N,): one linear layer on sines and cosines."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WAVES))
        self.bias = nn.Parameter(torch.empty(1))  # ZeRO's stage 3 takes no scalars

    def forward(self, told: Tensor) -> Tensor:
        waves = timestep_embedding(told / SLOWER, WAVES, torch.float32)  # (N, F)
        return (waves * self.weight).sum(1) + self.bias  # no product of matrices, which autocast would round

    @staticmethod
    def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """0: the loss begins as it would be without."""
        return torch.zeros(shape)
