"""New pictures of an autoencoder: latents drawn from the prior of its posteriors, N(0, I), and decoded.

What a variational autoencoder is as a model of pictures (Kingma & Welling 2014): x = decoder(z), z ~ N(0, I). The noise
of the decoder's own likelihood is left out, so that its mean is shown.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain import faults
from dtrain.conditions.build import NOTHING, Conditions, Said
from dtrain.config import Config, Eval
from dtrain.data.fields.picture import quantize
from dtrain.device_draws import normals_on
from dtrain.errors import NotFinite
from dtrain.evaluation.generate import named, which_not_finite
from dtrain.evaluation.start import Start
from dtrain.first_stage.pixels import Pixels
from dtrain.models.kl_autoencoder import KLAutoencoder
from dtrain.randomness import Draws, Purpose


@dataclass(frozen=True)
class Prior:
    """Decodings of N(0, I), each a function of (seed, id). Takes a `Generator`'s place. No collective.

    shape: (Z, h, w) of a latent. noise: by which generator it is drawn, `run.generator`.
    """

    model: KLAutoencoder
    shape: tuple[int, int, int]
    device: torch.device
    noise: int
    conditions = Conditions()  # an autoencoder is told nothing
    first_stage = Pixels()
    guide = None  # nothing is led away from
    reconstructs = False

    @classmethod
    def of(cls, model: KLAutoencoder, config: Config, device: torch.device) -> "Prior":
        side = config.data.image_size // model.downscale
        return cls(model.eval(), (model.latent_channels, side, side), device, config.run.generator)

    @staticmethod
    def evaluations(how: Eval, start: Start | None = None) -> int:
        """How often the network is asked for a block of images."""
        return 1

    def latents(self, ids: list[int], seed: int) -> Tensor:
        """Standard normals of these ids, float32 (n, Z, h, w) on the model's device."""
        keys = torch.tensor(ids, device=self.device)
        return normals_on(Draws(seed, self.noise), Purpose.SAMPLE_NOISE, keys, self.shape)

    @torch.inference_mode()
    def draw(
        self,
        ids: list[int],
        labels: Tensor,
        how: Eval,
        on_evaluation: Callable[[], None] = lambda: None,
        said: Said = NOTHING,
        start: Start | None = None,
    ) -> Tensor:
        """uint8 (n, channels, image_size, image_size). Raises NotFinite, with the ids."""
        assert not said, "it is told nothing, which is refused before a model is opened"
        assert start is None, "no picture is noised, which is refused before a model is opened"
        faults.at("eval:draw")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=how.precision == "bf16"):
            pixels = self.model.decode(self.latents(ids, how.seed))
        on_evaluation()
        if bad := [ids[row] for row in which_not_finite(pixels)]:
            raise NotFinite(f"{len(bad)} of {len(ids)} decoded latents are not finite (ids {named(bad)})")
        return quantize(pixels).cpu()
