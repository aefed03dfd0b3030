"""Pictures that samples begin at instead of at noise, and the part of them that stays: `dtrain sample --from`.

A picture is noised to a time of the walk and drawn from there (Meng et al. 2022, SDEdit). With a mask, x̂_0 is the
picture itself at every step where nothing new is drawn, and so are the pixels of the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.config import Data
from dtrain.data.fields.picture import normalize
from dtrain.diffusion.prediction import Partly
from dtrain.diffusion.solvers import Denoiser
from dtrain.errors import UserError
from dtrain.evaluation.pictures import picture_files, read_pictures

REPEATS = 5


@dataclass(frozen=True)
class Start:
    """images: uint8 (M, C, S, S), in turn. strength: share of the walk that is walked, 0 to 1; 1 begins at noise.

    anew: bool (M or 1, 1, S, S), in turn too, where something new is drawn; None: everywhere. repeats: of each step, so
    that what is new comes to fit the rest; above 1 the steps are ancestral, whatever the sampler.
    """

    images: Tensor
    strength: float
    anew: Tensor | None = None
    repeats: int = 1

    def __post_init__(self):
        if self.repeats < 1:
            raise UserError(f"repeats is {self.repeats}; take at least 1")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength {self.strength:g} is no share of the walk; take a number above 0, at most 1")
        if self.strength == 1 and self.anew is None:
            raise UserError(
                "strength 1 begins at pure noise, which no picture can be seen in; take 0.6, or give a mask"
            )

    def of(self, ids: Sequence[int]) -> "Start":
        """Those of the samples with these ids, in their order."""
        taken = lambda tensor: tensor[[i % len(tensor) for i in ids]]  # noqa: E731
        return replace(self, images=taken(self.images), anew=None if self.anew is None else taken(self.anew))

    def last(self, steps: int) -> int:
        """How many of the sampler's steps are walked: at least one."""
        return max(1, round(self.strength * steps))

    def pixels(self, device: torch.device) -> Tensor:
        """float32 (M, C, S, S) in [−1, 1]."""
        return normalize(self.images).to(device)

    def keeping(self, denoiser: Denoiser, x_0: Tensor) -> Denoiser:
        """One that knows x_0 (n, C, H, W) where nothing new is drawn. A latent is new if one of its pixels is."""
        if self.anew is None:
            return denoiser
        side = self.images.shape[-1] // x_0.shape[-1]
        anew = F.max_pool2d(self.anew.float(), side).bool().to(x_0.device)
        return lambda x, t: Partly(denoiser(x, t), x_0, anew)

    def kept(self, drawn: Tensor) -> Tensor:
        """uint8 (n, C, S, S), with the pictures' own pixels where nothing new is drawn."""
        return drawn if self.anew is None else drawn.where(self.anew.to(drawn.device), self.images.to(drawn.device))


def of_files(
    places: Sequence[str | Path],
    strength: float | None,
    masks: Sequence[str | Path],
    repeats: int | None,
    data: Data,
) -> Start | None:
    """What `--from`, `--strength`, `--mask` and `--repeats` say. Pictures and masks are cropped as held-out ones.

    A mask is white where something new is drawn. By default strength is 0.6, or 1 with a mask, and repeats 1, or 5.
    Raises UserError.
    """
    if not places:
        if strength is not None or masks or repeats is not None:
            raise UserError("strength, mask and repeats are of pictures to begin at; name them with --from")
        return None
    images, anew = read_pictures(picture_files(places), data), None
    if masks:
        anew = read_pictures(picture_files(masks), data).float().mean(1, keepdim=True) >= 128  # (M, 1, S, S)
        if not anew.flatten(1).any(1).all():
            raise UserError("a mask is black everywhere; it is white where something new is to be drawn")
    elif repeats is not None:
        raise UserError("repeats make what is new fit what a mask keeps; give one with --mask")
    return Start(images, strength or (1.0 if masks else 0.6), anew, repeats or (REPEATS if masks else 1))
