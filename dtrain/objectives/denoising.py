"""Denoising: a network learns what noise did to an image, at levels that a time distribution chooses.

    x_t = α_t x_0 + σ_t ε,  loss = ‖network(x_t, t) − target(x_0, ε, t)‖²  or the variational bound
(Ho et al. 2020, Algorithm 1; Nichol & Dhariwal 2021; Liu et al. 2023.) Of a flow whose network predicts x_0 the loss is
the velocity's (Li & He 2025).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dtrain.batch import Batch, Condition
from dtrain.diffusion import likelihood
from dtrain.diffusion.prediction import squared_error_weight
from dtrain.diffusion.process import Process
from dtrain.diffusion.tables import on_device
from dtrain.diffusion.times import UNIFORM, LogitNormal, SecondMoment, Uniform
from dtrain.objectives.objective import Losses, Network, Objective
from dtrain.position import Position

HYBRID = 0.001  # λ of L_hybrid, with L_VLB in bits/dim (Nichol & Dhariwal 2021, section 3.1)


@dataclass(frozen=True, eq=False)
class Denoising(Objective):
    """loss: simple | hybrid | vlb; the last two of a GaussianDiffusion only, as min_snr_gamma and SecondMoment are.

    `config.Gaussian` refuses what cannot be combined. Holds no generator: every random number comes as an argument.
    """

    process: Process
    loss: str = "simple"
    min_snr_gamma: float | None = None
    times: Uniform | LogitNormal | SecondMoment = UNIFORM

    def place(self, u: Tensor) -> Tensor:
        """Where in [0, 1) of the process the rows with these u (N,) in [0, 1) train; both float64."""
        return self.times.place(u)

    def losses(
        self, turn: str, networks: Mapping[str, Network], batch: Batch, condition: Condition, at: Position
    ) -> Losses:
        """What training descends. batch: x_0 and noise, float32 (N, C, H, W), and time, float64 (N,) in [0, 1).

        simple: the squared error of the prediction, its mean over C, H, W (Ho et al. 2020, equation 14), times the
        min-SNR weight where there is one; of a flow always of the velocity. vlb: T·L_t in bits/dim, an unbiased
        estimate of the bound without its constant L_T. hybrid: simple + 0.001·vlb in which the mean is detached, so
        that the bound trains the variance alone.

        The backbone: (x (N, C, H, W), process.model_time (N,), **condition) → (N, C or 2C, H, W). The rows have x_0's
        dtype, whatever it computes in.
        """
        place = self.place(batch["time"])
        rows = self.losses_at(networks["backbone"], batch["x_0"], batch["noise"], place, condition)
        weights = self.times.weights(place)
        return Losses(rows if weights is None else rows * weights.to(rows.dtype), place)

    def losses_at(self, model: Network, x0: Tensor, noise: Tensor, place: Tensor, condition: Condition) -> Tensor:
        """The rows of `losses` at given places (N,) float64 in [0, 1), unweighted by how they were chosen."""
        process = self.process
        t = process.time(place)
        x_t = process.noised(x0, noise, t)
        output = model(x_t, process.model_time(t, x0), **condition).to(x0.dtype)
        if self.loss == "vlb":
            losses = process.schedule.timesteps * likelihood.term(process, output, x0, x_t, t)
        else:
            losses = self.simple(output, x0, noise, t)
        if self.loss == "hybrid":
            prediction, channels = process.split(output)
            detached = torch.cat([prediction.detach(), channels], dim=1)
            bound = process.schedule.timesteps * likelihood.term(process, detached, x0, x_t, t)
            losses = losses + HYBRID * bound
        return losses

    def simple(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The loss `simple` (N,) of the network's output at x_t = α_t x_0 + σ_t ε, at the process' own times t (N,)."""
        process = self.process
        prediction, _ = process.split(output)
        losses = process.error(prediction, x0, noise, t).square().flatten(1).mean(1)
        if self.min_snr_gamma is None:
            return losses
        return losses * on_device(self._min_snr_weights, t.device)[t].to(losses.dtype)

    @cached_property
    def _min_snr_weights(self) -> Tensor:
        """The min-SNR weight of each timestep, float64 (T,)."""
        return squared_error_weight(self.process.prediction, self.process.schedule.snr, self.min_snr_gamma)

    def unweighted(self, losses: Tensor, place: Tensor) -> Tensor:
        """Losses (N,) as they would be had their places (N,) been chosen uniformly: those that levels compare."""
        weights = self.times.weights(place)
        return losses if weights is None else losses / weights

    # -- state: a time distribution with a memory ---------------------------------------------------------------------

    @property
    def observes(self) -> bool:
        """Whether `observe` must see the losses of every step: only then are they gathered."""
        return isinstance(self.times, SecondMoment)

    def observe(self, u: Tensor, losses: Tensor) -> None:
        """See the losses (n,) of rows with these u (n,), in the order of k.

        Every rank gives the rows of the whole global batch, after the step's last call of `losses`.
        """
        if self.observes:
            place = self.place(u)
            self.times.observe(self.process.time(place), self.unweighted(losses.detach(), place))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the networks: float32 on the CPU, the same on every rank."""
        if not self.observes:
            return {}
        return {f"times:{name}": value.cpu().float() for name, value in self.times.state().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave. Raises ValueError for other shapes."""
        if state:
            self.times.load_state({name.removeprefix("times:"): value for name, value in state.items()})

    def reset(self) -> None:
        """As if no step had been taken."""
        self.load_state({name: torch.zeros_like(value) for name, value in self.state().items()})
