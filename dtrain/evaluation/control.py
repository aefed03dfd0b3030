"""The pictures that control samples: those of the held-out split, and whether samples show what was asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dtrain import distributed
from dtrain.conditions.build import Conditions, Said
from dtrain.conditions.operators import grey
from dtrain.conditions.picture import Shown
from dtrain.config import Config
from dtrain.data.declared import shown
from dtrain.data.fields.picture import normalize
from dtrain.data.fields.samples import read_pictures
from dtrain.data.shards.cache import BlockCache
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import UserError
from dtrain.evaluation.names import obeyed
from dtrain.evaluation.pictures import picture_files
from dtrain.evaluation.pictures import read_pictures as read_files

Agreement = Mapping[str, tuple[float, int]]  # condition → (sum, count) over samples


@dataclass(frozen=True)
class HeldOutPictures:
    """What a split has for each condition that is told pictures, read when it is asked for."""

    config: Config
    split: Manifest
    cache: BlockCache | None

    def of(self, ids: Sequence[int]) -> Said:
        """What samples with these ids are asked for, those of the held-out samples i mod M: uint8 (n, C, S, S) each."""
        samples = [i % self.split.samples for i in ids]
        where = self.split, self.split.place
        return {
            name: read_pictures(
                *where, shown(name, section, self.config), samples, self.cache, self.config.data.scaling
            )
            for name, section in self.config.pictures.items()
        }


def of_files(places: Sequence[str | Path], config: Config, as_is: bool = False) -> dict[str, Tensor]:
    """Pictures by the condition that is told them: of files or folders, turned, scaled and cropped as held-out ones.

    places: NAME=PLACE is of the condition NAME alone, any other of all. as_is: they are the edges, masks and so on
    themselves, float32 in [0, 1]; else images to compute these from, uint8. Raises UserError.
    """
    if not config.pictures:
        raise UserError("this model is not told pictures; leave them out")
    of: dict[str, list[str | Path]] = {}
    for place in places:
        name, _, own = str(place).partition("=")
        for one in [name] if own and name in config.pictures else config.pictures:
            of.setdefault(one, []).append(own if own and name in config.pictures else place)
    found = {name: read_files(picture_files(several), config.data) for name, several in of.items()}
    if not as_is:
        return found
    levels = {name: (normalize(pictures) + 1) / 2 for name, pictures in found.items()}
    grey_ones = {name for name in levels if config.pictures[name].channels(config.data.channels) == 1}
    return {name: grey(pictures) if name in grey_ones else pictures for name, pictures in levels.items()}


def in_turn(pictures: Said, n: int) -> Said:
    """n pictures of each condition: all in turn."""
    return {name: several[torch.arange(n) % len(several)] for name, several in pictures.items()}


def measured(conditions: Conditions) -> list[Shown]:
    """The conditions whose pictures are computed, and can be computed of a sample too."""
    return [part for part in conditions.pictures if part.section.operator is not None]


def agreement(conditions: Conditions, ids: list[int], images: Tensor, asked: Said) -> Agreement:
    """How far the pictures of samples uint8 (n, C, S, S) are those that were asked for, of each that is computed.

    A mask: the share of its cells that are equal. Another: the correlation of its values in a sample; 1 is perfect.
    """
    found = {}
    for part in measured(conditions):
        there, here = (part.again(pictures, ids).double().flatten(1) for pictures in (asked[part.name], images))
        rows = (there == here).double().mean(1) if part.section.operator == "mask" else _correlation(there, here)
        found[part.name] = float(rows.sum()), len(rows)
    return found


def mean_agreement(own: Mapping[int, Agreement]) -> dict[str, float]:
    """control_NAME over the blocks of all ranks, by their numbers and in their order. A collective."""
    parts: dict[int, Agreement] = {}
    for of_rank in distributed.gather_objects(dict(own)):
        parts |= of_rank
    found = {}
    for name in parts[min(parts)] if parts else ():
        sums, counts = zip(*(parts[number][name] for number in sorted(parts)), strict=True)
        found[obeyed(name)] = sum(sums) / sum(counts)
    return found


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """The correlation of each row of two (n, m), (n,): 1 where both are one constant, 0 where one alone is constant."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    scale = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return torch.where(scale > 0, (x * y).sum(1) / scale.clamp(min=1e-30), (x == y).all(1).double())
