"""Evaluate a model: draw samples on all ranks, compare them with the held-out split.

Sample ids are dealt to ranks in blocks of `eval.batch_size`; nothing is communicated until the moments are merged, so
ranks may be unequally fast.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from dtrain import distributed
from dtrain.checkpoint.export import load_weights, open_checkpoint
from dtrain.config import Config
from dtrain.data import manifest as manifests
from dtrain.data.manifest import Manifest
from dtrain.data.stream import read_split
from dtrain.data.transforms import normalize
from dtrain.diffusion.process import build as build_process
from dtrain.evaluation.features import extractor, metric_name
from dtrain.evaluation.generate import Sampler
from dtrain.evaluation.likelihood import bits_per_dim
from dtrain.evaluation.metrics import frechet_distance
from dtrain.evaluation.statistics import Moments, Statistics
from dtrain.models.build import allocate
from dtrain.run import RunDirectory

SAMPLING_KEYS = (
    "sampler",
    "steps",
    "eta",
    "spacing",
    "clip",
    "guidance",
    "guidance_interval",
    "guidance_rescale",
    "guidance_channels",
    "batch_size",
    "seed",
)
READ_BLOCK = 512  # images of the reference split read and embedded at a time


class Reference:
    """The held-out split: its labels and the statistics of its features, computed once by all ranks together."""

    def __init__(self, config: Config, device: torch.device):
        self.manifest: Manifest = manifests.load(Path(config.data.holdout))
        self.extractor = extractor(config.eval.features, config)
        directory = Path(config.data.holdout).parent
        distributed.on_rank_0(manifests.check_shards, self.manifest, directory)
        moments = Moments(self.extractor.dimensions).to(device)
        size, channels, total = config.data.image_size, config.data.channels, self.manifest.samples
        labels = []
        rank, world_size = distributed.rank(), distributed.world_size()
        for number, start in enumerate(range(0, total, READ_BLOCK)):
            images, block_labels = read_split(
                self.manifest, directory, size, channels, start, min(start + READ_BLOCK, total)
            )
            labels.append(block_labels)  # every rank needs all labels
            if number % world_size == rank:
                moments.update(self.extractor(images.to(device)))
        self.labels = torch.cat(labels)
        first = min(config.eval.validation_images, total)
        images, _ = read_split(self.manifest, directory, size, channels, 0, first)
        self.validation = normalize(images), self.labels[:first]
        self.statistics: Statistics = moments.compute()


def weights_name(config: Config) -> str:
    """Which weights are evaluated, as it is written in the journal and MLflow."""
    return "raw" if config.eval.ema is None else f"ema_{config.eval.ema}"


def evaluate(
    sampler: Sampler, config: Config, reference: Reference, on_block: Callable[[int, int], None] = lambda done, of: None
) -> tuple[dict[str, float], dict]:
    """(metrics, context) of `eval.num_samples` samples; every rank calls it and gets the same answer.

    Sample id i has the label of held-out sample i mod M, so that the labels are distributed as in that split.
    """
    e = config.eval
    moments = Moments(reference.extractor.dimensions).to(sampler.device)
    samples = e.num_samples if "fd" in e.metrics else 0
    starts = range(0, samples, e.batch_size)[distributed.rank() :: distributed.world_size()]
    for done, start in enumerate(starts):
        ids = list(range(start, min(start + e.batch_size, e.num_samples)))
        labels = reference.labels[torch.tensor(ids) % len(reference.labels)]
        images = sampler.draw(ids, labels, e)
        moments.update(reference.extractor(images.to(sampler.device)))
        on_block(done + 1, len(starts))
    metrics = {}
    if "fd" in e.metrics:
        name = metric_name("fd", reference.extractor.name)
        metrics[name] = frechet_distance(moments.compute(), reference.statistics)
    if "bpd" in e.metrics:
        metrics |= bits_per_dim(sampler, *reference.validation, e.seed)
    context = {
        "ema": weights_name(config),
        "n": e.num_samples,
        **{key: getattr(e, key) for key in SAMPLING_KEYS},
        "features": reference.extractor.name,
        "extractor": reference.extractor.fingerprint,
        "reference": reference.manifest.hash,
    }
    return metrics, context


def open_sampler(
    run: RunDirectory, config: Config, weights: str, device: torch.device, step: int | None = None
) -> tuple[Sampler, int, int]:
    """(sampler, step, images) from a run's newest complete checkpoint, or the one of `step`. Raises UserError."""
    checkpoint = open_checkpoint(run, step)
    model = load_weights(checkpoint, allocate(config), "fp32" if weights == "raw" else weights).to(device)
    sampler = Sampler.of(model, build_process(config.diffusion), config, device)
    return sampler, checkpoint.meta["step"], checkpoint.meta["images"]
