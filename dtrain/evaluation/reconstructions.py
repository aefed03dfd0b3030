"""What an autoencoder makes of the held-out pictures, and how near that is to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain import distributed
from dtrain.config import Config, Eval
from dtrain.data.fields.picture import normalize, quantize
from dtrain.data.fields.samples import read_split
from dtrain.data.shards.cache import BlockCache, cache_of
from dtrain.data.shards.manifest import Manifest, load_holdout
from dtrain.errors import NotFinite
from dtrain.evaluation.generate import GRID_IDS, named, which_not_finite
from dtrain.evaluation.names import OF_LATENTS, OF_PAIRS
from dtrain.first_stage.pixels import Pixels
from dtrain.models.kl_autoencoder import KLAutoencoder

BEST_PSNR = 100.0  # dB, of a picture that came back bit for bit, whose own would be infinite


class Quality(NamedTuple):
    """Sums over some pictures. psnr: in dB, of 8-bit levels. ssim: with the window of Wang et al. 2004.

    latents, squares: of samples of the posteriors, their elements and the squares, expected. deviations: posteriors'.
    """

    psnr: float
    ssim: float
    pictures: int
    latents: float
    squares: float
    deviations: float
    elements: int


def mean_quality(of_blocks: dict[int, Quality]) -> dict[str, float]:
    """OF_PAIRS and OF_LATENTS over the blocks of all ranks, summed in the order of their numbers. A collective."""
    found = {number: one for own in distributed.gather_objects(of_blocks) for number, one in own.items()}
    total = Quality(*map(sum, zip(*(found[number] for number in sorted(found)), strict=True)))
    mean = total.latents / total.elements
    std = max(total.squares / total.elements - mean**2, 0.0) ** 0.5
    pairs = [total.psnr / total.pictures, total.ssim / total.pictures]
    return dict(zip(OF_PAIRS + OF_LATENTS, [*pairs, mean, std, total.deviations / total.elements], strict=True))


@dataclass(frozen=True)
class Reconstructions:
    """Held-out pictures through an autoencoder and back by the posteriors' means. Takes a `Generator`'s place.

    Image i is of the held-out picture i mod M. No random number, no collective.
    """

    model: KLAutoencoder
    config: Config
    split: Manifest
    cache: BlockCache | None
    device: torch.device
    first_stage = Pixels()
    reconstructs = True

    @classmethod
    def of(cls, model: KLAutoencoder, config: Config, device: torch.device) -> "Reconstructions":
        """Raises UserError where the held-out split cannot be read."""
        split = load_holdout(config.data)
        return cls(model.eval(), config, split, cache_of(config.data, split.place), device)

    @staticmethod
    def evaluations(how: Eval) -> int:
        """How often the network is asked for a block of images."""
        return 1

    def originals(self, ids: list[int]) -> Tensor:
        """uint8 (n, channels, image_size, image_size) of the held-out pictures that these images are of."""
        data, held_out = self.config.data, [(i - GRID_IDS if i >= GRID_IDS else i) % self.split.samples for i in ids]
        found, at = [], 0
        while at < len(ids):  # runs of neighbours are read together
            stop = at + 1
            while stop < len(ids) and held_out[stop] == held_out[stop - 1] + 1:
                stop += 1
            first, end = held_out[at], held_out[stop - 1] + 1
            place = self.split.place
            how = self.cache, data.upright, data.scaling
            images, _ = read_split(self.split, place, data.image_size, data.channels, first, end, *how)
            found.append(images)
            at = stop
        return torch.cat(found)

    @torch.inference_mode()
    def draw(
        self, ids: list[int], labels: Tensor, how: Eval, on_evaluation: Callable[[], None] = lambda: None
    ) -> Tensor:
        """uint8 (n, channels, image_size, image_size). Raises NotFinite, with the ids."""
        x = normalize(self.originals(ids)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=how.precision == "bf16"):
            mean, _ = self.model.encode(x)
            pixels = self.model.decode(mean)
        on_evaluation()
        if bad := [ids[row] for row in which_not_finite(pixels)]:
            raise NotFinite(f"{len(bad)} of {len(ids)} reconstructions are not finite (ids {named(bad)})")
        return quantize(pixels).cpu()

    @torch.inference_mode()
    def quality(self, ids: list[int], images: Tensor) -> Quality:
        """How near these images are to the pictures that they are of, and what lay between."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        originals = self.originals(ids)
        ours, theirs = images.double(), originals.double()
        errors = (ours - theirs).square().flatten(1).mean(1)  # (n,)
        psnr = (10 * torch.log10(255**2 / errors)).clamp(max=BEST_PSNR)
        ssim = structural_similarity_index_measure(ours, theirs, data_range=255.0, reduction="none")
        mean, log_variance = (part.double() for part in self.model.encode(normalize(originals).to(self.device)))
        sums = mean.sum(), (mean.square() + log_variance.exp()).sum(), (log_variance / 2).exp().sum()
        return Quality(float(psnr.sum()), float(ssim.sum()), len(ids), *map(float, sums), mean.numel())
