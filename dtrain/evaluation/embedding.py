"""Features of a data set's images, block by block, each rank its own blocks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dtrain import distributed
from dtrain.config import Config
from dtrain.data.fields.samples import read_split
from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.cache import BlockCache, cache_of
from dtrain.data.shards.manifest import Manifest
from dtrain.evaluation.features.build import Extractor, check_finite
from dtrain.evaluation.generate import OnProgress, quiet, which_not_finite
from dtrain.evaluation.metrics.kept import KeptFeatures

READ_BLOCK = 512  # images read and embedded at a time


def embedded(
    manifest: Manifest,
    place: str,
    features: Extractor,
    image_size: int,
    channels: int,
    device: torch.device,
    on_block: OnProgress = quiet,
    cache: BlockCache | None = None,
    upright: bool = True,
    scaling: str = "bicubic",
    images: int | None = None,
    mirrored: bool = False,
) -> Iterator[tuple[int, int, Tensor]]:
    """This rank's blocks of the first `images` of a manifest, by default of all: number, first image, features (n, D).

    mirrored: with the features of the mirror images below. Raises UserError and BadSample for what cannot be read.
    """
    total = manifest.samples if images is None else min(images, manifest.samples)
    starts = list(range(0, total, READ_BLOCK))
    mine = range(distributed.rank(), len(starts), distributed.world_size())
    sizes = [min(READ_BLOCK, total - starts[number]) for number in mine]
    for done, number in enumerate(mine):
        first, end = starts[number], starts[number] + sizes[done]
        found, _ = read_split(manifest, place, image_size, channels, first, end, cache, upright, scaling)
        own = features(found.to(device))
        yield number, first, torch.cat([own, features(found.flip(-1).to(device))]) if mirrored else own
        on_block(sum(sizes[: done + 1]), sum(sizes))


def of_training(
    config: Config, features: Extractor, device: torch.device, on_block: OnProgress = quiet
) -> Tensor | None:
    """float32 (M, D) on rank 0 of the first `eval.training_images` of data.shards, with mirror images where they flip.

    A collective. Raises UserError where the shards are not there, and NotFinite.
    """
    data = config.data
    manifest = distributed.agree(manifests.load, data.manifest_path)
    cache = distributed.agree(cache_of, data, data.shards)
    kept, how = KeptFeatures(features.dimensions, device), (cache, data.upright, data.scaling)

    def embed() -> list[int]:
        bad: list[int] = []
        blocks = embedded(
            manifest,
            data.shards,
            features,
            data.image_size,
            data.channels,
            device,
            lambda done, of: on_block(done, of, "training images"),
            *how,
            config.eval.training_images,
            data.flip,
        )
        for number, first, found in blocks:
            bad += [first + row for row in which_not_finite(found)]
            kept.update(number, found)
        return bad

    bad = distributed.agree(embed)
    check_finite(bad, manifest.samples, f"images of {manifest.path}", features.name)
    return kept.gather()
