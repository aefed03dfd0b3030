"""A learned curve that rises from (0, 0) to (1, 1) whatever its weights: the schedule of variational diffusion."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 16


class MonotoneCurve(nn.Module):
    """c(t) = r(t)/r(1) with r(t) = t + Σ_j h_j (s(a_j t + b_j) − s(b_j)), s logistic and h_j, a_j ≥ 0.

    In the place of Kingma et al. 2021's network of positive weights (appendix H): the steps of r are its hidden layer,
    and t itself keeps the slope above 0. The constructor only allocates; it begins as a nearly straight line.
    """

    def __init__(self, steps: int = STEPS):
        super().__init__()
        self.activation_checkpointing = False
        self.heights = nn.Parameter(torch.empty(steps))  # h before softplus
        self.rates = nn.Parameter(torch.empty(steps))  # a before softplus
        self.offsets = nn.Parameter(torch.empty(steps))  # b

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c(t), c'(t)), float64 (n,) both, of t float64 (n,) in [0, 1]; autocast leaves float64 alone."""
        times = torch.cat([t, torch.ones_like(t[:1])])[:, None]  # (n + 1, 1), the end behind
        heights, rates = F.softplus(self.heights.double()), F.softplus(self.rates.double())  # (K,)
        offsets = self.offsets.double()
        ahead = rates * times  # (n + 1, K)
        # s(b + d) − s(b), which never cancels and is never below 0.
        steps = -torch.expm1(-ahead) * torch.sigmoid(offsets + ahead) * torch.sigmoid(-offsets)
        risen = times[:, 0] + (heights * steps).sum(1)  # (n + 1,)
        slopes = rates * torch.sigmoid(offsets + ahead) * torch.sigmoid(-offsets - ahead)
        slope = 1 + (heights * slopes).sum(1)
        return risen[:-1] / risen[-1], slope[:-1] / risen[-1]

    @staticmethod
    def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Equal steps side by side, of together the height of the line; float32."""
        (steps,) = shape
        if name == "heights":
            return torch.full(shape, 1 / steps, dtype=torch.float64).expm1().log().float()
        rate = 2.0 * steps
        if name == "rates":
            return torch.full(shape, rate, dtype=torch.float64).expm1().log().float()
        return (-rate * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps).float()
