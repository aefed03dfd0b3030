"""Adaptive projected guidance: what of a guided difference is kept (Sadat et al. 2024, APG, algorithm 1)."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from dtrain.diffusion.prediction import to_x0
from dtrain.diffusion.tables import known

X0 = Callable[[Tensor | float, Tensor | float, Tensor], Tensor]  # (output, x_t, t (N,)) → x̂_0; linear in both


@dataclass
class Projection:
    """How a difference between two answers changes before it is scaled; one object a walk of a sampler.

    Differences are judged where pixels or latents are, as differences of x̂_0. orthogonal: how much of their part along
    the better-told x̂_0 is left out, which only raises contrast; the paper's η is 1 − orthogonal. norm: the largest L2
    norm a row's may have; None: any. momentum: how much of the one before is added; below 0 it is taken back. With 0,
    None and 0 a difference stays as it is, bit for bit.
    """

    x0: X0
    orthogonal: float = 0.0
    norm: float | None = None
    momentum: float = 0.0
    _running: dict[int, Tensor] = field(default_factory=dict)  # by the number of the difference among one answer's

    def __call__(self, number: int, difference: Tensor, answer: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """difference, answer, x (N, C, H, W), t (N,); the answer is the better-told one."""
        slope = self.x0(1.0, 0.0, t)  # of x̂_0 over the output
        if self.momentum:
            running = slope * difference
            if number in self._running:
                running = running + self.momentum * self._running[number]
            self._running[number] = running
            difference = running / slope
        if self.norm is not None:
            size = (slope * difference).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            difference = difference * (self.norm / size).clamp(max=1.0)
        if self.orthogonal:
            towards = self.x0(answer, x, t).flatten(1)
            along = (difference.flatten(1) * towards).sum(1) / towards.square().sum(1)
            difference = difference - self.orthogonal * (along[:, None] * towards).view_as(difference)
        return difference


def projection(process, orthogonal: float, norm: float | None, momentum: float) -> Projection | None:
    """Of a walk along a process, all rows of which have one time; None where differences stay as they are."""
    if not (orthogonal or norm or momentum):
        return None

    def x0(output: Tensor | float, x: Tensor | float, t: Tensor) -> Tensor:
        time = known(t)
        return to_x0(process.prediction, output, x, *process.level_told(t[0].item() if time is None else time))

    return Projection(x0, orthogonal, norm, momentum)
