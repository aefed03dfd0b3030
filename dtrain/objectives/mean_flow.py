"""The mean velocity between two times, learned from its identity (Geng et al. 2025, MeanFlow).

    u(x_t, r, t) = v − (t − r) du/dt,   du/dt along (v, 0, 1) in (x, r, t), without gradient

v is the velocity ε − x_0 of the row's own path. With `along` network du/dt is taken along the network's own velocity
u(x_t, t, t), which has not the noise of a single path (improved MeanFlow). The derivative is a central difference:
fused attention has no forward-mode differentiation, and two more forwards need none.

With guidance v is for rows that are told something

    ω v + κ u(x_t, t, t | c) + (1 − ω − κ) u(x_t, t, t | null),   ω = scale · (1 − κ)

without gradient, whose mean at the solution is scale · v(x_t | c) + (1 − scale) · v(x_t | null) at any κ: what guidance
of that scale would have made of two answers, in one (section 4.3 of the paper and its appendix).
"""

from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class BuiltIn:
    """Guidance that is part of the velocity learned. mix: κ. from_images: images seen before it begins. null: of a
    condition, what the same rows are told where nothing is said, as samplers have it.
    """

    scale: float
    mix: float
    from_images: int
    null: Callable[[Condition], Condition]


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
    guidance: BuiltIn | None = None

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
        x_t = self.process.noised(x0, noise, t)
        velocity, along = self._velocities(network, x_t, noise - x0, t, condition, at)
        change = self._change(network, x_t, along, t, r, condition)
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
    def _velocities(
        self, network: Network, x_t: Tensor, velocity: Tensor, t: Tensor, condition: Condition, at: Position
    ) -> tuple[Tensor, Tensor]:
        """(the velocity to learn, guided where it is to be; the one along which the mean changes), (N, C, H, W) each.

        velocity: of the rows' own paths.
        """
        built_in = self.guidance if self.guidance is not None and at.images >= self.guidance.from_images else None
        asked = [condition] if self.along == "network" or (built_in is not None and built_in.mix) else []
        if built_in is not None:
            asked.append(nothing := built_in.null(condition))
        answers = self._answers(network, x_t, t, asked) if asked else []
        if built_in is not None:
            omega = built_in.scale * (1 - built_in.mix)
            guided = omega * velocity + (1 - omega - built_in.mix) * answers[-1]
            if built_in.mix:
                guided = guided + built_in.mix * answers[0]
            velocity = torch.where(_told(condition, nothing).view(-1, 1, 1, 1), guided, velocity)
        return velocity, answers[0] if self.along == "network" else velocity

    def _answers(self, network: Network, x_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> tuple[Tensor, ...]:
        """The network's own velocity u(x_t, t, t) under each of these conditions, all in one batch."""
        m = len(conditions)
        told = {name: torch.cat([one[name] for one in conditions]) for name in conditions[0]}
        times = torch.cat([t] * m)
        return network(torch.cat([x_t] * m), self.process.told(times, times), **told).to(x_t.dtype).chunk(m)

    @torch.no_grad()
    def _change(
        self, network: Network, x_t: Tensor, along: Tensor, t: Tensor, r: Tensor, condition: Condition
    ) -> Tensor:
        """(t − r) du/dt along (`along`, 0, 1), 0 where t − r is less than a step; (N, C, H, W).

        Divided by the way that there is between both sides: times end at 0 and 1.
        """
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


def _told(condition: Condition, nothing: Condition) -> Tensor:
    """Which rows are told anything: bool (N,), false where all that a row is told is the null."""
    differs = [(value != nothing[name]).reshape(len(value), -1).any(1) for name, value in condition.items()]
    return torch.stack(differs).any(0)
