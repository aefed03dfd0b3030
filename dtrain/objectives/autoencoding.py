"""Autoencoding: pictures through a Gaussian over latents and back (Kingma & Welling 2014; Rombach et al. 2022).

    loss = Σ |x − x̂| + kl_weight · KL(N(mean, deviation²) ‖ N(0, I)),   x̂ = decoder(mean + deviation · ε)

both sums over a picture's elements, divided by their number, so that the learning rate of one size fits another. Where
the config asks for them, further terms are a perceptual distance of x and x̂, and the judgement of a critic D,

    + perceptual.weight · d(x, x̂) − critic.weight · λ · D(x̂)

which learns by the hinge loss ½ max(0, 1 − D(x)) + ½ max(0, 1 + D(x̂)) in a turn of its own.

λ of a step is ‖∇rec‖ / (‖∇D‖ + 1e-4) of the step before it, 0 at first: gradients of the global batch at the weight of
the decoder's last convolution, rec the error with the perceptual distance. Their sums travel in the step's reduction:
λ is the same at any number of ranks and micro-batches, and costs no second pass through the decoder.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.batch import Batch, Condition
from dtrain.config import Optim
from dtrain.config.autoencoding import Autoencoding as Section
from dtrain.models.patch_critic import PatchCritic
from dtrain.objectives.objective import Losses, Network, Objective, Turn
from dtrain.position import Position

KERNEL = 3  # pixels a side, of the decoder's last convolution
SMALLEST, MOST = 1e-4, 1e4  # beside the critic's gradient; of λ, as latent diffusion has it


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) ‖ N(0, I)) in nats (N,), summed over all but the rows."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


class Autoencoding(Objective):
    """What the `objective` section says. Reports the mean squared error of pixels in [−1, 1], the divergence in nats
    and the parts of the terms that there are.

    channels: of a picture. width: of the model's first level, whose features the decoder's last convolution takes.
    optim: the backbone's.
    """

    process = None

    def __init__(self, section: Section, channels: int, width: int, optim: Optim):
        self._section = section
        self._distance = None  # of features, once `open` has read them
        self._shape = channels, width, KERNEL, KERNEL  # of the last convolution's weight
        self._ratio = torch.zeros(())  # λ of the next step
        self.parts = ("mse", "kl")
        if section.perceptual is not None:
            self.parts += ("perceptual",)
        if (critic := section.critic) is not None:
            self.parts += ("critic_ratio", "critic_real", "critic_fake")
            of_critic = Turn(("critic",), critic.optim(optim), averaged=False, from_step=critic.from_step)
            self.turns = {"main": Turn(("backbone",)), "critic": of_critic}
            self.networks = {"critic": lambda: PatchCritic(channels, critic.width, critic.layers)}
            self.sums = dict.fromkeys(("reconstruction", "critic"), channels * width * KERNEL**2)

    def open(self, device: torch.device) -> None:
        if self._section.perceptual is not None:
            from dtrain.objectives import perceptual  # only a training needs it

            self._distance = perceptual.build(self._section.perceptual, device)

    @property
    def frozen(self) -> Mapping[str, str]:
        return {} if self._distance is None else {"objective.perceptual": self._distance.fingerprint}

    def losses(
        self, turn: str, networks: Mapping[str, Network], batch: Batch, condition: Condition, at: Position
    ) -> Losses:
        """batch: x_0 float32 (N, C, H, W) in [−1, 1], and posterior, standard normal (N, Z, h, w)."""
        x, noise = batch["x_0"], batch["posterior"]
        if turn == "critic":
            return self._of_critic(networks, x, noise)
        pixels, mean, log_variance, features = networks["backbone"](x, noise)
        kl = divergence(mean, log_variance)
        parts = {"mse": (pixels.detach() - x).square().flatten(1).mean(1), "kl": kl.detach()}
        sums = {}
        if self._section.critic is None or at.step < self._section.critic.from_step:
            rows = self._reconstruction(pixels, x, parts)
        else:
            rows, sums = self._judged(networks["critic"], pixels, features, x, parts)
        rows = rows + self._section.kl_weight / x[0].numel() * kl
        return Losses(rows, None, {name: (value.sum(), len(x)) for name, value in parts.items()}, sums)

    def _reconstruction(self, pixels: Tensor, x: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """The error and the perceptual distance (N,)."""
        error = pixels - x
        rows = (error.square() if self._section.reconstruction == "l2" else error.abs()).flatten(1).mean(1)
        if self._section.perceptual is not None:
            distance = self._distance(pixels, x)
            parts["perceptual"] = distance.detach()
            rows = rows + self._section.perceptual.weight * distance
        return rows

    def _judged(
        self, critic: Network, pixels: Tensor, features: Tensor, x: Tensor, parts: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(rows whose gradient is that of the reconstruction and of λ times the judgement, both gradients' sums).

        Both gradients are taken at the pixels, of a copy, so that one pass through the decoder serves both; what they
        are at the last convolution's weight follows from its input.
        """
        ratio = float(self._ratio)
        weight = self._section.critic.weight * ratio
        copy = pixels.detach().requires_grad_()
        reconstruction, judgement = self._reconstruction(copy, x, parts), -critic(copy).mean(1)
        pulls = [torch.autograd.grad(one.sum(), copy)[0] for one in (reconstruction, judgement)]
        parts["critic_ratio"] = x.new_full((len(x),), ratio)
        towards = ((pulls[0] + weight * pulls[1]) * pixels).flatten(1).sum(1)
        value = (reconstruction + weight * judgement).detach()
        sums = {
            name: torch.nn.grad.conv2d_weight(features.float(), self._shape, pull, padding=KERNEL // 2).flatten()
            for name, pull in zip(self.sums, pulls, strict=True)
        }
        return value + (towards - towards.detach()), sums

    def _of_critic(self, networks: Mapping[str, Network], x: Tensor, noise: Tensor) -> Losses:
        with torch.no_grad():
            pixels = networks["backbone"](x, noise).pixels
        real, fake = networks["critic"](torch.cat([x, pixels])).chunk(2)  # (N, patches) each
        rows = 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean(1)
        parts = {"critic_real": real.detach().mean(1), "critic_fake": fake.detach().mean(1)}
        return Losses(rows, None, {name: (value.sum(), len(x)) for name, value in parts.items()})

    # -- state: λ ------------------------------------------------------------------------------------------------------

    def on_reduced(self, means: Mapping[str, Tensor]) -> None:
        if means:
            reconstruction, judgement = (means[name].norm() for name in self.sums)
            self._ratio = (reconstruction / (judgement + SMALLEST)).clamp(max=MOST).float()

    def state(self) -> dict[str, Tensor]:
        return {} if self._section.critic is None else {"critic_ratio": self._ratio.view(1)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._section.critic is not None:
            self._ratio = state["critic_ratio"].view(())

    def reset(self) -> None:
        self._ratio = torch.zeros(())
