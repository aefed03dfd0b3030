"""The training images nearest to samples: whether a model draws what it has seen. The one section that needs torch.

The training set is read once from beginning to end, block by block; what is kept is k distances a sample.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from dtrain import distributed
from dtrain.config import Config, Data
from dtrain.data.fields.samples import read_moments, read_split
from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.cache import cache_of
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import BadSample
from dtrain.evaluation.features.build import Extractor, check_finite, extractor
from dtrain.evaluation.generate import GRID_IDS, which_not_finite
from dtrain.evaluation.opened import open_generator
from dtrain.evaluation.requirements import check_generates
from dtrain.first_stage.pixels import FirstStage
from dtrain.report.markup import escaped
from dtrain.report.numbers import short
from dtrain.report.pictures import data_uri
from dtrain.report.runs import Run
from dtrain.run import RunDirectory

NEAREST = 5  # training images shown of each sample
BLOCK = 512  # training images in memory at a time
BY_DIFFERENCES = "donot_use_mm_for_euclid_dist"
SHOWN = 96  # pixels, of one picture in the page

PicturesOf = Callable[[Manifest, str, int, int], Tensor]  # (manifest, place, start, stop) → uint8 (n, C, H, W)
OnBlock = Callable[[int, int], None]
Progress = Callable[[str], AbstractContextManager[OnBlock]]  # of what is done → what to tell of each block


@dataclass(frozen=True)
class Found:
    """Samples of a run's newest checkpoint and what is nearest to them.

    samples: uint8 (N, C, H, W). distances: (N, k) in the features' own units, rising. numbers: (N, k) of images counted
    through the training manifests. neighbours: uint8 (N, k, C, H, W), as they were nearest: mirrored where the run
    mirrors. held_out: (M,), from M held-out images each to its nearest training image, to compare with; M ≤ N.
    """

    step: int
    features: str
    samples: Tensor
    distances: Tensor
    numbers: Tensor
    neighbours: Tensor
    held_out: Tensor
    searched: int


def nearest(
    run: RunDirectory, config: Config, count: int, features: str | None, weights: str | None, progress: Progress
) -> Found:
    """Search all training images for those nearest to `count` samples, the first of the run's own sample grid.

    Raises UserError where the run has no checkpoint, or its data are not where its config says.
    """
    check_generates(config, run.path)
    device, data = distributed.device(), config.data
    manifest = manifests.load_all(data)
    manifests.check_all(manifest, data)
    measure = extractor(
        features or config.eval.features, data.image_size, data.channels, weights or config.eval.weights, device
    )
    opened = open_generator(run, config, device)
    generator, step = opened.generator, opened.step
    samples = torch.empty(0, data.channels, data.image_size, data.image_size, dtype=torch.uint8)
    with progress("sampling") as on_block:
        for start in range(0, count, config.eval.batch_size):
            ids = torch.arange(start, min(start + config.eval.batch_size, count))
            labels = ids % max(1, min(config.model.num_classes, 10))  # as in the grid
            samples = torch.cat([samples, generator.draw((GRID_IDS + ids).tolist(), labels, config.eval)])
            on_block(len(samples), count)
    held_out = _held_out(data, count)
    wanted = torch.cat([measure(part.to(device)) for part in (samples, held_out) if len(part)])
    check_finite(which_not_finite(wanted), len(wanted), "samples and held-out images", measure.name)
    with progress("searching the training images") as on_block:
        pictures_of = _pictures_of(config, generator.first_stage, device)
        distances, numbers = _search(wanted, measure, data, manifest, pictures_of, on_block)
    pictures = torch.stack([_picture(n, data, manifest, pictures_of) for n in numbers[:count].flatten().tolist()])
    return Found(
        step,
        measure.name,
        samples,
        distances[:count],
        numbers[:count] // 2,
        pictures.unflatten(0, (count, -1)),
        distances[count:, 0],
        sum(m.samples for m in (manifest, *manifest.mixed)),
    )


def html(run: Run, found: Found, several: bool) -> str:
    """A row a sample: itself, then what is nearest with the distance below."""
    rows = ""
    for number, sample in enumerate(found.samples):
        near = zip(
            found.neighbours[number], found.numbers[number].tolist(), found.distances[number].tolist(), strict=True
        )
        cells = "".join(
            f'<figure><img src="{_uri(picture)}" alt="training image {n:,}" title="training image {n:,}">'
            f"<figcaption>{short(distance)}</figcaption></figure>"
            for picture, n, distance in near
        )
        own = f'<figure><img src="{_uri(sample)}" alt="sample {number}"><figcaption>sample</figcaption></figure>'
        rows += f'<div class="scroll near" tabindex="0">{own}{cells}</div>'
    facts = [
        f"Samples of step {found.step:,} and the nearest of {found.searched:,} training images, with their Euclidean "
        f"distance in {found.features} features"
        + (", training images also mirrored" if run.setting("data.flip") else "")
        + f". Median distance to the nearest: {short(float(found.distances[:, 0].median()))}"
    ]
    if len(found.held_out):
        facts.append(f", of {len(found.held_out)} held-out images {short(float(found.held_out.median()))}")
    name = f"<h3>{escaped(run.name)}</h3>" if several else ""
    return f'{name}<p class="note">{escaped("".join(facts))}.</p><div class="neighbours">{rows}</div>'


def _reader(manifest: Manifest, place: str, data: Data):
    """`read_split` of a range, as the run reads pictures."""
    how = {"upright": data.upright, "scaling": data.scaling}
    return partial(read_split, manifest, place, data.image_size, data.channels, **how)


def _held_out(data: Data, count: int) -> Tensor:
    if not data.holdout:
        return torch.empty(0, data.channels, data.image_size, data.image_size, dtype=torch.uint8)
    manifest = manifests.load_holdout(data)
    many = min(count, manifest.samples)
    cache = cache_of(data, manifest.place)
    return _reader(manifest, manifest.place, data)(0, many, cache)[0]


def _sources(data: Data, manifest: Manifest) -> Iterator[tuple[Manifest, str, int]]:
    """Each training manifest with the place of its shards and the number of its first image among all."""
    first = 0
    for one, source in zip((manifest, *manifest.mixed), (data, *data.mix), strict=True):
        yield one, source.shards, first
        first += one.samples


def _pictures_of(config: Config, first_stage: FirstStage, device: torch.device) -> PicturesOf:
    """What reads training images; those of a latent cache are decoded."""
    data = config.data
    if not config.first_stage.reads_cache:

        def read(manifest: Manifest, place: str, start: int, stop: int) -> Tensor:
            return _reader(manifest, place, data)(start, stop)[0]

        return read

    def decoded(manifest: Manifest, place: str, start: int, stop: int) -> Tensor:
        return first_stage.shown(read_moments(manifest, place, config.shape, start, stop).to(device)).cpu()

    return decoded


def _search(
    wanted: Tensor,
    measure: Extractor,
    data: Data,
    manifest: Manifest,
    pictures_of: PicturesOf,
    on_block: OnBlock,
) -> tuple[Tensor, Tensor]:
    """(distances, numbers), both (N, k) by rising distance, on the CPU.

    Numbers are 2·image, plus 1 where the mirrored one is nearer.
    """
    nearest, numbers = wanted.new_empty(len(wanted), 0), torch.empty(len(wanted), 0, dtype=torch.int64)
    total = sum(one.samples for one, _, _ in _sources(data, manifest))
    for one, place, first in _sources(data, manifest):
        for start in range(0, one.samples, BLOCK):
            stop = min(start + BLOCK, one.samples)
            images, rows = _read(one, place, data, pictures_of, start, stop)
            if not len(images):
                continue
            # By differences: by products, an exact copy would not be at distance 0.
            kinds = [images, images.flip(-1)] if data.flip else [images]
            found = torch.stack(
                [torch.cdist(wanted, measure(k.to(wanted.device)), compute_mode=BY_DIFFERENCES) for k in kinds]
            )
            closer = found.min(0)
            of = 2 * (first + rows) + closer.indices.cpu()
            both, all_numbers = torch.cat([nearest, closer.values], 1), torch.cat([numbers, of], 1)
            nearest, order = both.topk(min(NEAREST, both.shape[1]), dim=1, largest=False, sorted=True)
            numbers = all_numbers.gather(1, order.cpu())
            on_block(first + stop, total)
    return nearest.cpu(), numbers


def _read(
    manifest: Manifest, place: str, data: Data, pictures_of: PicturesOf, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """(images, their numbers) from start to stop; without damaged ones where the run goes on without them."""
    try:
        return pictures_of(manifest, place, start, stop), torch.arange(start, stop)
    except BadSample:
        if data.on_error != "replace":
            raise
    images, rows = [], []
    for number in range(start, stop):
        try:
            images.append(pictures_of(manifest, place, number, number + 1))
            rows.append(number)
        except BadSample:
            continue
    return torch.cat(images) if images else torch.empty(0), torch.tensor(rows, dtype=torch.int64)


def _picture(number: int, data: Data, manifest: Manifest, pictures_of: PicturesOf) -> Tensor:
    """uint8 (C, H, W) of a training image, mirrored where its number is odd."""
    image, mirrored = divmod(number, 2)
    source = next(s for s in reversed(list(_sources(data, manifest))) if s[2] <= image)
    at = image - source[2]
    picture = pictures_of(source[0], source[1], at, at + 1)[0]
    return picture.flip(-1) if mirrored else picture


def _uri(image: Tensor) -> str:
    """A picture of an image uint8 (C, H, W), large enough to be seen."""
    picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())
    if picture.width <= SHOWN // 2:
        scale = SHOWN // picture.width
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
    picture.thumbnail((SHOWN, SHOWN))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return data_uri(content.getvalue(), "png")
