"""A generator of each step of a short chain, against a critic (Xiao et al. 2022, denoising diffusion GAN).

    generator:  softplus(−D(x̂_{t−1}, x_t, t)),   x̂_{t−1} ~ q(· | x_t, network(x_t, z, t))
    critic:     softplus(−D(x_{t−1}, x_t, t)) + softplus(D(x̂_{t−1}, x_t, t)) + ½ r1 ‖∇D(x_{t−1})‖²

The last term, R1 (Mescheder et al. 2018), is there in every `r1_every`-th step. Both turns of a step see the same rows
with the same random numbers, each after the other player's last step.
"""

from collections.abc import Mapping

import torch
from torch.nn.functional import softplus

from dtrain.batch import Batch, Condition
from dtrain.config import Optim
from dtrain.config.diffusion import DenoisingGAN as Section
from dtrain.diffusion.denoising_gan import DenoisingGAN
from dtrain.models.step_critic import StepCritic
from dtrain.objectives.objective import Losses, Network, Objective, Turn
from dtrain.position import Position


class AgainstCritic(Objective):
    """What the `diffusion` section says. Reports both scores and, where it was computed, R1's squared gradient.

    shape: (C, H, W) of x_0. num_classes: of the model. optim: the backbone's.
    """

    validates = False
    parts = ("critic_real", "critic_fake", "r1")

    def __init__(
        self, process: DenoisingGAN, section: Section, shape: tuple[int, int, int], num_classes: int, optim: Optim
    ):
        self.process, self._r1, self._every = process, section.r1, section.r1_every
        channels, side, _ = shape
        alone = section.timesteps == 1
        self.networks = {"critic": lambda: StepCritic(side, channels, section.critic.width, num_classes, alone)}
        of_critic = Turn(("critic",), section.critic.optim(optim), averaged=False, differentiates=section.r1 > 0)
        self.turns = {"main": Turn(("backbone",)), "critic": of_critic}

    def losses(
        self, turn: str, networks: Mapping[str, Network], batch: Batch, condition: Condition, at: Position
    ) -> Losses:
        """batch: x_0, noise, step_noise and reverse_noise, float32 (N, C, H, W), latent float32 (N, Z), time float64
        (N,) in [0, 1).

        The backbone: (x_t (N, C, H, W), process.told (N, 1 + Z), **condition) → x̂_0 (N, C, H, W).
        """
        process, x0 = self.process, batch["x_0"]
        t = process.time(batch["time"])
        before, x_t = process.pair(x0, batch["noise"], batch["step_noise"], t)
        with torch.set_grad_enabled(turn == "main"):
            drawn = networks["backbone"](x_t, process.told(t, batch["latent"]), **condition).to(x0.dtype)
            drawn = process.reverse(drawn, x_t, batch["reverse_noise"], t)
        critic, y = networks["critic"], condition.get("y")
        if turn == "main":
            return Losses(softplus(-critic(drawn, x_t, t, y)), batch["time"])
        penalised = self._r1 > 0 and at.step % self._every == 0
        real = critic(before.requires_grad_(penalised), x_t, t, y)
        fake = critic(drawn, x_t, t, y)
        rows, parts = softplus(-real) + softplus(fake), {"critic_real": real.detach(), "critic_fake": fake.detach()}
        if penalised:
            (slope,) = torch.autograd.grad(real.sum(), before, create_graph=True)
            squared = slope.square().flatten(1).sum(1)
            rows, parts["r1"] = rows + self._r1 / 2 * squared, squared.detach()
        return Losses(rows, None, {name: (value.sum(), len(value)) for name, value in parts.items()})
