"""Evaluate a model: draw samples on all ranks, compare them with the held-out split.

Ids are dealt to ranks in blocks of `eval.batch_size`; nothing is communicated until the features are brought
together, so ranks may be unequally fast.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dtrain import distributed, faults
from dtrain.conditions.build import Said
from dtrain.config import Config, Eval, Sampling
from dtrain.config.evaluation import DENSITIES, OF_THE_MODEL, OF_THE_PRIOR
from dtrain.diffusion.samplers import network_evaluations
from dtrain.errors import UserError
from dtrain.evaluation import ode_likelihood, straightness
from dtrain.evaluation.control import Agreement, agreement, mean_agreement
from dtrain.evaluation.features.build import check_finite
from dtrain.evaluation.generate import Generator, OnProgress, quiet, which_not_finite
from dtrain.evaluation.likelihood import bits_per_dim, nats_per_dim
from dtrain.evaluation.metrics import build as metrics
from dtrain.evaluation.metrics.asked import mean_score, scorers
from dtrain.evaluation.metrics.kept import KeptFeatures
from dtrain.evaluation.metrics.moments import MomentStream
from dtrain.evaluation.names import reconstructed
from dtrain.evaluation.opened import weights_name
from dtrain.evaluation.prior import Prior
from dtrain.evaluation.reconstructions import Quality, Reconstructions, mean_quality
from dtrain.evaluation.reference import Reference
from dtrain.evaluation.requirements import needs_features, needs_split
from dtrain.evaluation.scratch import Scratch
from dtrain.first_stage.pixels import Pixels
from dtrain.objectives.build import build as build_objective
from dtrain.run import RunDirectory
from dtrain.tracking.best import settings_of

# What determines an image beside weights and label; part of a metric's context.
SAMPLING_KEYS = tuple(Sampling.model_fields)
# Of these, what they are where they are not said: a context lacks them then, as those from before they existed.
UNSAID = {"decode_batch": None, "negative_prompt": "", "sde_noise": None}
UNSAID |= {"guidance_orthogonal": 0.0, "guidance_norm": None, "guidance_momentum": 0.0}
UNSAID |= {"guidance_renoise": "guided", "guide_with": None}
UNSAID |= {"images": "reconstructions"}
UNSAID |= {"control_scale": {}, "guess_mode": False}
UNSAID |= {"churn": 0.0, "churn_min": 0.0, "churn_max": 0.0, "churn_noise": 1.0}

# What else determines some metrics; in the context of these.
OF_METRICS = ("bpd_clip", "ode_tolerance", "ode_probes", "training_images")


def sampling_of(e: Eval) -> dict[str, Any]:
    """The value of each of SAMPLING_KEYS that has an effect. What is not named and has no default is no setting."""
    found = {key: getattr(e, key) for key in (OF_THE_PRIOR if e.images == "prior" else SAMPLING_KEYS)}
    return {key: value for key, value in found.items() if key not in UNSAID or value != UNSAID[key]}


def labels_of(ids: list[int], e: Eval, num_classes: int, reference: Reference) -> Tensor:
    """int64 (n,): id i has the label of the held-out sample i mod M; `uniform`: all classes in turn."""
    i = torch.tensor(ids)
    if e.labels == "uniform" or reference.labels is None:
        return i % max(1, num_classes)
    return reference.labels[i % len(reference.labels)]


def asked_of(ids: list[int], reference: Reference) -> Said:
    """Id i has the captions, and the pictures, of the held-out sample i mod M."""
    captions = {name: [held[i % len(held)] for i in ids] for name, held in reference.captions.items()}
    return captions | (reference.pictures.of(ids) if reference.pictures else {})


def blocks_of_a_rank(e: Eval) -> tuple[range, range]:
    """(first ids of all blocks of samples, numbers of those that are this rank's)."""
    drawn = e.num_samples if set(e.metrics) - OF_THE_MODEL else 0
    starts = range(0, drawn, e.batch_size)
    return starts, range(distributed.rank(), len(starts), distributed.world_size())


def evaluations_of_a_rank(config: Config) -> int:
    """How often this rank asks the network for the samples of an evaluation."""
    return len(blocks_of_a_rank(config.eval)[1]) * evaluations_of_a_block(config)


def evaluations_of_a_block(config: Config) -> int:
    """How often the network is asked for a block of samples. Raises UserError for steps that it cannot take."""
    e = config.eval
    if not config.objective.diffuses:
        return 1
    return network_evaluations(build_objective(config).process, e.sampler, e.steps, e.spacing)


def evaluate(
    generator: Generator | Reconstructions | Prior,
    config: Config,
    reference: Reference,
    on_progress: OnProgress = quiet,
    scratch: Scratch | None = None,
) -> tuple[dict[str, float], dict]:
    """(metrics, context) of `eval.num_samples` samples; every rank calls it and gets the same answer.

    on_progress: called with this rank's evaluations of the network. With `scratch`, each block drawn is kept there, and
    those that are there already are not drawn again. What one rank meets, all ranks raise (`distributed.agree`);
    NotFinite, with their ids, where samples have features that are no finite numbers.
    """
    e, extractor = config.eval, reference.extractor
    moments = MomentStream(extractor.dimensions, generator.device)
    kept = KeptFeatures(extractor.dimensions, generator.device) if needs_features(e) else None
    starts, mine = blocks_of_a_rank(e)
    a_block = generator.evaluations(e)
    judges = distributed.agree(scorers, config, reference.captions, generator.device)
    scores: dict[str, dict[int, Tensor]] = {judge.name: {} for judge in judges}  # of this rank's blocks
    qualities: dict[int, Quality] = {}  # of this rank's blocks, where the images are reconstructions
    agreements: dict[int, Agreement] = {}  # where pictures control the samples

    def asked(ids: list[int]) -> tuple[Tensor, Said]:
        return labels_of(ids, e, config.model.num_classes, reference), asked_of(ids, reference)

    def draw() -> list[int]:
        bad: list[int] = []  # ids
        for before, number in enumerate(mine):
            evaluations = itertools.count(before * a_block + 1)
            ids = list(range(starts[number], min(starts[number] + e.batch_size, e.num_samples)))
            images = _images(
                generator,
                ids,
                asked,
                e,
                scratch,
                (config.data.channels, config.data.image_size, config.data.image_size),
                lambda evaluations=evaluations: on_progress(next(evaluations), len(mine) * a_block),
            )
            features = extractor(images.to(generator.device))
            if faults.spoils("eval:features"):
                features = torch.full_like(features, torch.nan)
            bad += [ids[row] for row in which_not_finite(features)]
            moments.update(features)
            if kept is not None:
                kept.update(number, features)
            for judge in judges:
                scores[judge.name][number] = judge(images.to(generator.device), *asked(ids))
            if generator.reconstructs:
                qualities[number] = generator.quality(ids, images)
            elif reference.pictures is not None:
                agreements[number] = agreement(generator.conditions, ids, images, reference.pictures.of(ids))
            on_progress((before + 1) * a_block, len(mine) * a_block)
        return bad

    bad = distributed.agree(draw)  # a disk may be full on one machine alone
    check_finite(bad, e.num_samples, "samples", extractor.name)
    found = {}
    if starts:
        statistics = moments.compute()
        features = kept.gather() if kept is not None else None

        def compute() -> dict[str, float]:
            on_progress(0, 0, f"computing {', '.join(e.metrics)} of {e.num_samples:,} samples")
            parts = features, reference.features, reference.training
            on_device = [f if f is None else f.to(generator.device) for f in parts]
            return metrics.compute(e, extractor, statistics, reference.statistics, *on_device, reference.comparable)

        found = distributed.on_rank_0(compute)
        if generator.reconstructs:
            found = {reconstructed(name): value for name, value in found.items()} | mean_quality(qualities)
    found |= {name: mean_score(own) for name, own in scores.items()}
    if reference.pictures is not None:
        found |= mean_agreement(agreements)
    if "bpd" in e.metrics:
        found |= bits_per_dim(
            generator, *reference.validation, e.seed, e.bpd_clip, on_progress, reference.of_validation()
        )
    if "nats_per_dim_latent" in e.metrics:
        found |= nats_per_dim(generator, *reference.validation, e.seed, on_progress, reference.of_validation())
    for metric in sorted(DENSITIES & set(e.metrics)):
        found |= ode_likelihood.measured(
            metric, generator, *reference.validation, e, on_progress, reference.of_validation()
        )
    if "straightness" in e.metrics:
        found |= straightness.measured(generator, min(e.num_samples, e.validation_images), asked, e, on_progress)
    context = {
        "ema": weights_name(e),
        "n": e.num_samples,
        **sampling_of(e),
        "labels": e.labels,
        "features": extractor.name,
        "extractor": extractor.fingerprint,
        "reference": reference.hash,
        **of_the_reference(e, reference),
    }
    if generator.first_stage.fingerprint != Pixels.fingerprint:
        context["first_stage"] = generator.first_stage.fingerprint
    if e.guide_with is not None:
        context["guide"] = generator.guide.checkpoint
    context |= {judge.key: judge.fingerprint for judge in judges}
    if not generator.reconstructs and (encoders := generator.conditions.fingerprints):
        context["text_encoders"] = encoders
    return found, context


def of_the_reference(e: Eval, reference: Reference) -> dict[str, Any]:
    """What else a number depends on: how the reference was made, which held-out images; part of its context."""
    found: dict[str, Any] = {}
    if reference.resize is not None:
        found["reference_resize"] = reference.resize
    if OF_THE_MODEL & set(e.metrics):
        found["validation_images"] = e.validation_images
    if "bpd" in e.metrics:
        found["bpd_clip"] = e.bpd_clip
    if "memorisation" in e.metrics:
        found["training_images"] = e.training_images
    if DENSITIES & set(e.metrics):
        found |= {"ode_tolerance": e.ode_tolerance, "ode_probes": e.ode_probes}
    if reference.changed.upright:
        found["exif"] = "apply"
    if reference.changed.bicubic:
        found["scaling"] = "bicubic"
    if needs_split(e) and reference.manifest.hash != reference.hash:
        found["holdout"] = reference.manifest.hash
    return found


def _images(
    generator: Generator | Reconstructions | Prior,
    ids: list[int],
    asked: Callable[[list[int]], tuple[Tensor, Said]],
    how: Eval,
    scratch: Scratch | None,
    shape: tuple[int, int, int],
    on_evaluation: Callable[[], None],
) -> Tensor:
    """uint8 (n, *shape) of a block of ids, out of `scratch` where they are there. asked: labels and captions of ids."""
    found = scratch.read(ids[0], len(ids), shape) if scratch is not None else None
    if found is None:
        labels, said = asked(ids)
        found = generator.draw(ids, labels, how, on_evaluation, **({"said": said} if said else {}))
        if scratch is not None:
            try:
                scratch.write(ids[0], found)
            except OSError as e:
                raise UserError(f"cannot keep samples in {scratch.path}: {e.strerror}; make room there") from None
    return found


def sampling_settings(checkpoint: str, e: Eval, reference: Reference) -> dict[str, Any]:
    """All that determines the samples drawn from the checkpoint of this hash; not how many there are."""
    uniform = e.labels == "uniform" or reference.manifest is None
    return {
        "checkpoint": checkpoint,
        "weights": weights_name(e),
        **sampling_of(e),
        "labels": "uniform" if uniform else reference.manifest.hash,
        **({"captions": reference.manifest.hash} if reference.captions or reference.pictures else {}),
    }


def differences(evaluations: Sequence[dict], own: Eval, now: Eval, context: dict[str, Any]) -> dict[str, Any]:
    """What of an evaluation with this context is not as in the training's first, so that no curve may hold both.

    evaluations: the lines of the training's own. Before there is a first one, its settings are those of `own`, the
    run's section; `now` is the evaluation's. Weights and number of samples are in every context anyhow; batches only
    change rounding.
    """
    keys = sorted({*SAMPLING_KEYS, "labels"} - {"batch_size", "decode_batch"})
    first = next(map(settings_of, evaluations), None)
    was = UNSAID | (first or json.loads(json.dumps({key: getattr(own, key) for key in (*keys, *OF_METRICS)})))
    keys += sorted({"validation_images", *OF_METRICS, "holdout"} & context.keys() & was.keys())
    is_now = UNSAID | json.loads(json.dumps(context))
    found = {key: is_now[key] for key in keys if key in is_now and is_now[key] != was.get(key, is_now[key])}
    other = first.get("reference") != context["reference"] if first else own.reference != now.reference
    return found | ({"reference": now.reference or context["reference"][:12]} if other else {})


def scratch_of(run: RunDirectory, e: Eval, checkpoint: str, reference: Reference) -> Scratch:
    """Where the samples of this evaluation wait for it to be started again."""
    return Scratch(run.path / "evaluations", sampling_settings(checkpoint, e, reference))
