"""What a first stage alone costs: the Fréchet distance of held-out pictures, encoded and decoded, to the reference.

No network trained in its latents can be expected below it, so a report draws it as the floor of the curve. It is
computed once for each setting; a journal's event "floor" keeps it.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from dtrain import distributed
from dtrain.config import Config
from dtrain.data.fields.picture import normalize
from dtrain.data.fields.samples import read_split
from dtrain.data.shards.cache import cache_of
from dtrain.evaluation.features.build import check_finite
from dtrain.evaluation.generate import OnProgress, encoded, quiet, which_not_finite
from dtrain.evaluation.metrics.frechet import frechet_distance
from dtrain.evaluation.metrics.moments import MomentStream
from dtrain.evaluation.names import metric_name, reconstructed
from dtrain.evaluation.reference import Reference
from dtrain.files import beside
from dtrain.first_stage.pixels import FirstStage, Pixels
from dtrain.run import RunDirectory
from dtrain.tracking.journal import EVALUATIONS, outline

EVENT = "floor"
BLOCK = 64  # pictures at a time


class Floor(NamedTuple):
    """A distance by its name, and all that it depends on."""

    metrics: dict[str, float]
    context: dict[str, Any]

    def __str__(self) -> str:
        ((name, value),) = self.metrics.items()
        return f"{name} {value:.4f}: the first stage alone, of {self.context['n']:,} held-out pictures"


def setting(first_stage: FirstStage, config: Config, reference: Reference) -> dict[str, Any] | None:
    """All that the distance depends on; None where there is none, of pixels or without held-out pictures.

    As many pictures as there are samples, where the split has them: a distance of fewer is another, larger one.
    """
    if isinstance(first_stage, Pixels) or reference.manifest is None or "fd" not in config.eval.metrics:
        return None
    n = min(config.eval.num_samples, reference.manifest.samples)
    if n < 2:
        return None
    resize = {} if reference.resize is None else {"reference_resize": reference.resize}
    return resize | {
        "n": n,
        "features": reference.extractor.name,
        "extractor": reference.extractor.fingerprint,
        "reference": reference.hash,
        "holdout": reference.manifest.hash,
        "first_stage": first_stage.fingerprint,
    }


def lines_of(run: RunDirectory) -> Iterator[dict[str, Any]]:
    """The lines of the run's journal, and of those that evaluations wrote beside it."""
    for path in (run.journal_file, *beside(run.journal_file, EVALUATIONS)):
        yield from outline(path)


def measure(
    first_stage: FirstStage,
    config: Config,
    reference: Reference,
    known: Callable[[], Iterable[dict[str, Any]]],
    device: torch.device,
    on_progress: OnProgress = quiet,
) -> Floor | None:
    """None where there is none, or where it is known. A collective; raises UserError as `distance` does.

    known: gives the journal's lines; called on rank 0 alone.
    """
    wanted = setting(first_stage, config, reference)
    if wanted is None or distributed.on_rank_0(_is_among, wanted, known):
        return None
    return Floor(distance(first_stage, config, reference, wanted["n"], device, on_progress), wanted)


def _is_among(wanted: dict[str, Any], known: Callable[[], Iterable[dict[str, Any]]]) -> bool:
    return any(line["event"] == EVENT and line["context"] == wanted for line in known())


@torch.inference_mode()
def distance(
    first_stage: FirstStage,
    config: Config,
    reference: Reference,
    n: int,
    device: torch.device,
    on_progress: OnProgress = quiet,
) -> dict[str, float]:
    """`rfid`, or `rfd_<features>`, of the first n held-out pictures. A collective; each rank reads its share.

    Raises UserError, also for a picture whose latent or whose features are not finite.
    """
    data, extractor, split = config.data, reference.extractor, reference.manifest
    moments = MomentStream(extractor.dimensions, device)
    starts = range(0, n, BLOCK)[distributed.rank() :: distributed.world_size()]
    cache = distributed.agree(cache_of, data, split.place)
    how = {"cache": cache, "upright": data.upright, "scaling": data.scaling}
    read = partial(read_split, split, split.place, data.image_size, data.channels, **how)

    def embed() -> list[int]:
        bad: list[int] = []
        for done, start in enumerate(starts):
            stop = min(start + BLOCK, n)
            images, _ = read(start, stop)
            latents = encoded(first_stage, normalize(images.to(device)), start)
            features = extractor(first_stage.decode(latents).to(device))
            bad += [start + row for row in which_not_finite(features)]
            moments.update(features)
            on_progress(done + 1, len(starts), "reconstructing held-out pictures")
        return bad

    bad = distributed.agree(embed)
    check_finite(bad, n, "reconstructions", extractor.name)
    statistics = moments.compute()
    name = reconstructed(metric_name("fd", extractor.name, comparable=reference.comparable))
    return {name: distributed.on_rank_0(frechet_distance, statistics, reference.statistics)}
