"""Evaluate a model: draw samples on all ranks, compare them with the held-out split.

Sample ids are dealt to ranks in blocks of `eval.batch_size`; nothing is communicated until the features are brought
together, so ranks may be unequally fast.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtrain import distributed
from dtrain.checkpoint.directory import manifest_hash, step_path
from dtrain.checkpoint.export import load_weights, open_checkpoint
from dtrain.config import Config, Eval
from dtrain.diffusion.process import build as build_process
from dtrain.errors import UserError
from dtrain.evaluation import metrics
from dtrain.evaluation.generate import Sampler
from dtrain.evaluation.kept import KeptFeatures
from dtrain.evaluation.likelihood import bits_per_dim
from dtrain.evaluation.reference import Reference
from dtrain.evaluation.scratch import Scratch
from dtrain.evaluation.statistics import Moments
from dtrain.models.build import allocate
from dtrain.run import RunDirectory

# What determines an image beside weights and label; part of a metric's context.
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
    "precision",
    "batch_size",
    "seed",
)


def weights_name(config: Config) -> str:
    """Which weights are evaluated, as it is written in the journal and MLflow."""
    return "raw" if config.eval.ema is None else f"ema_{config.eval.ema}"


def labels_of(ids: list[int], config: Config, reference: Reference) -> Tensor:
    """int64 (n,): of held-out sample id mod M, so distributed as in that split; `uniform`: all classes in turn."""
    numbers = torch.tensor(ids)
    if config.eval.labels == "uniform" or reference.labels is None:
        return numbers % max(1, config.model.num_classes)
    return reference.labels[numbers % len(reference.labels)]


def evaluate(
    sampler: Sampler,
    config: Config,
    reference: Reference,
    on_block: Callable[[int, int], None] = lambda done, of: None,
    scratch: Scratch | None = None,
) -> tuple[dict[str, float], dict]:
    """(metrics, context) of `eval.num_samples` samples; every rank calls it and gets the same answer.

    With `scratch`, each block drawn is kept there, and those that are there already are not drawn again.
    """
    e, extractor = config.eval, reference.extractor
    moments = Moments(extractor.dimensions).to(sampler.device)
    kept = KeptFeatures(extractor.dimensions, sampler.device) if metrics.needs_features(e) else None
    drawn = e.num_samples if set(e.metrics) - metrics.OF_THE_MODEL else 0
    starts = range(0, drawn, e.batch_size)
    mine = range(distributed.rank(), len(starts), distributed.world_size())
    for done, number in enumerate(mine):
        ids = list(range(starts[number], min(starts[number] + e.batch_size, e.num_samples)))
        images = _images(sampler, ids, lambda ids: labels_of(ids, config, reference), e, scratch)
        features = extractor(images.to(sampler.device))
        moments.update(features)
        if kept is not None:
            kept.update(number, features)
        on_block(done + 1, len(mine))
    found = {}
    if drawn:
        statistics = moments.compute()
        features = kept.gather() if kept is not None else None
        on_device = [f if f is None else f.to(sampler.device) for f in (features, reference.features)]
        found = distributed.on_rank_0(metrics.compute, e, extractor, statistics, reference.statistics, *on_device)
    if "bpd" in e.metrics:
        found |= bits_per_dim(sampler, *reference.validation, e.seed)
    context = {
        "ema": weights_name(config),
        "n": e.num_samples,
        **{key: getattr(e, key) for key in SAMPLING_KEYS},
        "labels": e.labels,
        "features": extractor.name,
        "extractor": extractor.fingerprint,
        "reference": reference.hash,
    }
    return found, context


def _images(
    sampler: Sampler, ids: list[int], labels: Callable[[list[int]], Tensor], how: Eval, scratch: Scratch | None
) -> Tensor:
    """uint8 (n, C, H, W) of a block of ids, out of `scratch` where they are there."""
    found = scratch.read(ids[0], len(ids), sampler.shape) if scratch is not None else None
    if found is None:
        found = sampler.draw(ids, labels(ids), how)
        if scratch is not None:
            try:
                scratch.write(ids[0], found)
            except OSError as e:
                raise UserError(f"cannot keep samples in {scratch.path}: {e.strerror}; make room there") from None
    return found


def open_sampler(
    run: RunDirectory, config: Config, weights: str, device: torch.device, step: int | None = None
) -> tuple[Sampler, int, int]:
    """(sampler, step, images) from a run's newest complete checkpoint, or the one of `step`. Raises UserError."""
    checkpoint = open_checkpoint(run, step)
    model = load_weights(checkpoint, allocate(config), "fp32" if weights == "raw" else weights).to(device)
    sampler = Sampler.of(model, build_process(config.diffusion), config, device)
    return sampler, checkpoint.meta["step"], checkpoint.meta["images"]


def identity(run: RunDirectory, config: Config, step: int, reference: Reference) -> dict[str, Any]:
    """All that determines the samples of an evaluation of checkpoint `step`: of every id, so not their number."""
    uniform = config.eval.labels == "uniform" or reference.manifest is None
    return {
        "checkpoint": manifest_hash(step_path(run.checkpoints, step)),
        "weights": weights_name(config),
        **{key: getattr(config.eval, key) for key in SAMPLING_KEYS},
        "labels": "uniform" if uniform else reference.manifest.hash,
    }


def differences(was: Config, now: Config) -> dict[str, Any]:
    """What an evaluation changed of the run's own settings, so that its numbers belong to no curve of the run.

    Weights and number of samples are told of every evaluation anyhow; the batch only changes rounding.
    """
    keys = {*SAMPLING_KEYS, "labels", "reference"} - {"batch_size"}
    return {key: getattr(now.eval, key) for key in sorted(keys) if getattr(now.eval, key) != getattr(was.eval, key)}


def scratch_of(run: RunDirectory, config: Config, step: int, reference: Reference) -> Scratch:
    """Where the samples of this evaluation wait for it to be started again."""
    return Scratch(run.path / "evaluations", identity(run, config, step, reference))
