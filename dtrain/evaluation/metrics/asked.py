"""Whether a sample shows what it was asked for: a score of each, and their mean over all samples."""

from typing import Protocol

import torch
from torch import Tensor

from dtrain import distributed
from dtrain.conditions.build import Said
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.evaluation.features.clip import Clip
from dtrain.evaluation.features.networks import UserNetwork


class Scorer(Protocol):
    """name: of the metric. key: of `eval`, which names its network; fingerprint: of all that decides a score."""

    name: str
    key: str
    fingerprint: str

    def __call__(self, images: Tensor, labels: Tensor, said: Said) -> Tensor:
        """float64 (n,), NaN of a sample that was asked for nothing. images: uint8 (n, C, H, W); labels: int64 (n,)."""


class ClipScore:
    """100 · max(cos(picture, caption), 0) of CLIP's vectors.

    Hessel et al. (2021), "CLIPScore: a reference-free evaluation metric for image captioning", has 2.5 in place of 100.
    """

    name, key = "clip_score", "clip_model"

    def __init__(self, folder: str, condition: str, device: torch.device):
        """condition: the one whose captions are compared."""
        self._clip, self._condition = Clip(folder, device), condition
        self.fingerprint = self._clip.fingerprint

    def __call__(self, images: Tensor, labels: Tensor, said: Said) -> Tensor:
        captions = said[self._condition]
        cosines = (self._clip(images).double() * self._clip.words(captions).double()).sum(1).cpu()
        scores = 100 * cosines.clamp(min=0)
        return scores.where(torch.tensor([bool(one.strip()) for one in captions]), torch.nan)


class Agreement:
    """1 where the class that a user's network finds is the one that was asked for, else 0."""

    name, key = "agreement", "classifier"

    def __init__(self, file: str, num_classes: int, device: torch.device):
        self._network = UserNetwork(file, device, "eval.classifier")
        self.fingerprint = self._network.fingerprint
        if (found := self._network.dimensions) < num_classes:
            raise UserError(f"{file} gives {found} scores, and model.num_classes is {num_classes}; name another file")

    def __call__(self, images: Tensor, labels: Tensor, said: Said) -> Tensor:
        return (self._network(images).argmax(1).cpu() == labels.cpu()).double()


def scorers(config: Config, captions: Said, device: torch.device) -> list[Scorer]:
    """Those of `eval.metrics`. captions: that samples will be asked for. Raises UserError where one cannot be."""
    e, found = config.eval, []
    if ClipScore.name in e.metrics:
        condition = next(iter(config.texts))
        if not any(one.strip() for one in captions.get(condition, ())):
            raise UserError(f"clip_score: no held-out picture has a caption for conditions.{condition}; leave it out")
        found.append(ClipScore(e.clip_model, condition, device))
    if Agreement.name in e.metrics:
        found.append(Agreement(e.classifier, config.model.num_classes, device))
    return found


def mean_score(blocks: dict[int, Tensor]) -> float:
    """Over all ranks' samples that have a score, in the order of their blocks; NaN where none has. A collective.

    blocks: this rank's scores (n,) by the number of the block.
    """
    whole = {number: own for of_rank in distributed.gather_objects(blocks) for number, own in of_rank.items()}
    return float(torch.cat([whole[number] for number in sorted(whole)]).nanmean())
