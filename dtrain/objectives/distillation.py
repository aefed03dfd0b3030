"""Progressive distillation: one step of the network ends where two of a frozen teacher do (Salimans & Ho 2022).

From x_t, t of the network's walk of N steps, the teacher goes by x_m to x_s, deterministically: DDIM, which is Euler's
method on a flow. With its estimates a = x̂_0(x_t, t) and b = x̂_0(x_m, m)

    x_m = α_m a + σ_m (x_t − α_t a)/σ_t,   x_s = α_s b + σ_s (x_m − α_m b)/σ_m

the one x̃_0 whose single step from x_t ends at x_s is a mixture of both, since each step is linear in its estimate:

    x̃_0 = w a + (1 − w) b,   w = (σ_s/σ_m) (α_m − α_t σ_m/σ_t) / (α_s − α_t σ_s/σ_t)

so that no difference of two states has to be taken. What is descended is the loss of `denoising.py` on x̃_0 and the ε̃
with which x_t = α_t x̃_0 + σ_t ε̃: of a flow that of the velocity (x_t − x_s)/(t − s).
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from dtrain.batch import Batch, Condition
from dtrain.config.distillation import Distillation as Section
from dtrain.diffusion.guidance import guided
from dtrain.diffusion.tables import on_device
from dtrain.objectives.denoising import Denoising
from dtrain.objectives.objective import Frozen, Losses, Network, Objective
from dtrain.position import Position

Read = Callable[[torch.device], Frozen]


class Distillation(Objective):
    """denoising: the same process' own objective, whose loss is descended. null: of a condition, what the same rows are
    told where nothing is said. read: the teacher, in eval mode; None where nobody trains.
    """

    validates = False  # most levels are not trained

    def __init__(
        self, denoising: Denoising, section: Section, null: Callable[[Condition], Condition], read: Read | None
    ):
        self.process, self._denoising, self._section = denoising.process, denoising, section
        self._null, self._read = null, read
        self._teacher, self._model = None, None
        process, n = self.process, section.steps
        walk, half = process.walk(n, "trailing"), process.walk(2 * n, "trailing")
        assert half[::2] == walk
        dtype = torch.float64 if isinstance(walk[0], float) else torch.int64  # a flow's times, or timesteps
        self._times, self._middles = (torch.tensor(one, dtype=dtype) for one in (walk, half[1::2]))  # (N,) each
        self._halves = _halves([process.level(t) for t in [*half, process.clean]])

    def open(self, device: torch.device) -> None:
        self._teacher = self._read(device)
        self._model = guided(self._teacher.network, self._section.guidance, self._null)

    @property
    def frozen(self) -> Mapping[str, str]:
        return {} if self._teacher is None else {"objective.teacher": self._teacher.fingerprint}

    def losses(
        self, turn: str, networks: Mapping[str, Network], batch: Batch, condition: Condition, at: Position
    ) -> Losses:
        """batch: x_0 and noise, float32 (N, C, H, W), and time, float64 (N,) in [0, 1), which chooses of the walk."""
        x0, noise, process = batch["x_0"], batch["noise"], self.process
        number = (batch["time"] * self._section.steps).long()  # (N,), 0 of the most noise
        t = on_device(self._times, number.device)[number]
        x_t = process.noised(x0, noise, t)
        target = self._target(x_t, t, number, condition)
        alpha, sigma = (self._of_rows(name, number, x_t) for name in ("alpha", "sigma"))
        output = networks["backbone"](x_t, process.model_time(t, x_t), **condition).to(x0.dtype)
        rows = self._denoising.simple(output, target, (x_t - alpha * target) / sigma, t)
        return Losses(rows, t if t.is_floating_point() else (t.double() + 0.5) / process.last_time)

    @torch.no_grad()
    def _target(self, x_t: Tensor, t: Tensor, number: Tensor, condition: Condition) -> Tensor:
        """x̃_0 (N, C, H, W) of rows that are at these numbers of the walk."""
        process, middle = self.process, on_device(self._middles, number.device)[number]
        first = process.x0(self._answer(x_t, t, condition), x_t, t)
        decay, gain, share = (self._of_rows(name, number, x_t) for name in ("decay", "gain", "share"))
        x_m = decay * x_t + gain * first
        second = process.x0(self._answer(x_m, middle, condition), x_m, middle)
        return share * first + (1 - share) * second

    def _answer(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        rounded = self._section.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16) if rounded else nullcontext():
            return self._model(x, self.process.model_time(t, x), **condition).to(x.dtype)

    def _of_rows(self, name: str, number: Tensor, like: Tensor) -> Tensor:
        """A column of the table for each row, rounded once: (N, 1, 1, 1)."""
        return on_device(self._halves[name], number.device)[number].to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _halves(levels: list[tuple[float, float]]) -> dict[str, Tensor]:
    """Five columns, float64 (N,), one value for each step of the walk.

    alpha, sigma: α_t and σ_t. decay, gain: x_m = decay · x_t + gain · a. share: w above. levels: (α, σ) of t, m,
    s = the next t, and so on to clean data.
    """
    columns: dict[str, list[float]] = {name: [] for name in ("alpha", "sigma", "decay", "gain", "share")}
    for (alpha_t, sigma_t), (alpha_m, sigma_m), (alpha_s, sigma_s) in zip(
        levels[:-1:2], levels[1::2], levels[2::2], strict=True
    ):
        gain = alpha_m - alpha_t * sigma_m / sigma_t
        share = sigma_s / sigma_m * gain / (alpha_s - alpha_t * sigma_s / sigma_t)
        for name, value in zip(columns, (alpha_t, sigma_t, sigma_m / sigma_t, gain, share), strict=True):
            columns[name].append(value)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
