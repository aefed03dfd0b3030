"""The mean velocity between two times, learned from its identity (Geng et al. 2025, MeanFlow).

    u(x_t, r, t) = v − (t − r) du/dt,   du/dt along (v, 0, 1) in (x, r, t), without gradient

v is the velocity ε − x_0 of the row's own path. With `along` network du/dt is taken along the network's own velocity
u(x_t, t, t), which has not the noise of a single path (improved MeanFlow). The derivative is a central difference:
fused attention has no forward-mode differentiation, and two more forwards need none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.batch import Batch, Condition
from dtrain.diffusion.mean_flow import MeanFlow
from dtrain.diffusion.times import LogitNormal
from dtrain.objectives.objective import Losses, Network, Objective
from dtrain.position import Position

STEP = 0.005  # of time, to each side: 5e-5 of the derivative off in float32
FLOOR = 1e-3  # beside a row's squared error in its weight


@dataclass(frozen=True, eq=False)
class MeanVelocity(Objective):
    """span_share: of rows with two times. along: data or network. power: of a row's weight. Reports the mean squared
    error, which the weights hide. Draws no random number.
    """

    process: MeanFlow
    times: LogitNormal
    span_share: float
    along: str
    power: float

    parts = ("mse",)

    def losses(
        self, turn: str, networks: Mapping[str, Network], batch: Batch, condition: Condition, at: Position
    ) -> Losses:
        """batch: x_0 and noise, float32 (N, C, H, W); time, other_time and span, float64 (N,) in [0, 1).

        The backbone: (x (N, C, H, W), process.told (N, 2), **condition) → (N, C, H, W).
        """
        x0, noise, network = batch["x_0"], batch["noise"], networks["backbone"]
        one, other = self.times.place(batch["time"]), self.times.place(batch["other_time"])
        has_span = batch["span"] < self.span_share
        t = torch.where(has_span, torch.maximum(one, other), one)
        r = torch.where(has_span, torch.minimum(one, other), one)
        x_t, velocity = self.process.noised(x0, noise, t), noise - x0
        change = self._change(network, x_t, velocity, t, r, condition)
        u = network(x_t, self.process.told(t, r), **condition).to(x0.dtype)
        squared = (u - velocity + change).square().flatten(1)
        total = squared.sum(1)  # (N,), as the paper weights it
        rows = total / (total.detach() + FLOOR) ** self.power
        mse = squared.detach().mean(1)
        return Losses(rows, t, {"mse": (mse.sum(), len(x0))}, by_level=mse)

    def losses_at(self, network: Network, x0: Tensor, noise: Tensor, place: Tensor, condition: Condition) -> Tensor:
        """The squared error of the velocity itself at given places (N,) float64 in [0, 1)."""
        x_t = self.process.noised(x0, noise, place)
        output = network(x_t, self.process.told(place, place), **condition).to(x0.dtype)
        return (output - (noise - x0)).square().flatten(1).mean(1)

    @torch.no_grad()
    def _change(
        self, network: Network, x_t: Tensor, velocity: Tensor, t: Tensor, r: Tensor, condition: Condition
    ) -> Tensor:
        """(t − r) du/dt, 0 where t − r is less than a step; (N, C, H, W).

        Divided by the way that there is between both sides: times end at 0 and 1.
        """
        along = velocity
        if self.along == "network":
            along = network(x_t, self.process.told(t, t), **condition).to(x_t.dtype)
        later, earlier = (t + STEP).clamp(max=1.0), (t - STEP).clamp(min=0.0)
        states = torch.cat([x_t + _like(to - t, x_t) * along for to in (later, earlier)])
        times, twice = torch.cat([later, earlier]), {n: torch.cat([one, one]) for n, one in condition.items()}
        answers = network(states, self.process.told(times, torch.cat([r, r])), **twice).to(x_t.dtype)
        ahead, behind = answers.chunk(2)
        span = torch.where(t - r < STEP, 0.0, t - r)
        return _like(span / (later - earlier), x_t) * (ahead - behind)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """float64 (N,) as (N, 1, …) in x's dtype."""
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
